"""A contract for import-linter: modules that may import what is listed, and nothing else.

A list of forbidden modules misses every module that is written later. This list has to be extended by hand instead.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AllowlistContract(Contract):
    """`source_modules` and everything below them may import directly only each other and `allowed_modules`."""

    source_modules = fields.SetField(subfield=fields.ModuleField())
    allowed_modules = fields.SetField(subfield=fields.ModuleField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Every direct import that is not on the list."""
        roots = {module.name for module in self.source_modules}  # type: ignore[attr-defined]
        allowed = roots | {module.name for module in self.allowed_modules}  # type: ignore[attr-defined]
        sources = roots.union(*(graph.find_descendants(root) for root in roots))
        trespasses = [
            (source, imported)
            for source in sorted(sources)
            for imported in sorted(graph.find_modules_directly_imported_by(source))
            if not any(imported == name or imported.startswith(f"{name}.") for name in allowed)
        ]
        return ContractCheck(kept=not trespasses, metadata={"trespasses": trespasses})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """A line for each trespass."""
        for source, imported in check.metadata["trespasses"]:
            output.print_error(f"{source} may not import {imported}")
