"""envoy/envoy.yaml with other addresses, for the demo, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

SCRIPT = "least_request.lua"


def envoy_file(name: str) -> Path:
    """The path of a file in envoy/, from an installed wheel or a checkout. FileNotFoundError if it is in neither."""
    package = Path(__file__).parents[1]
    for folder in (package / "_envoy", package.parent / "envoy"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"envoy/{name} is not installed")


def bootstrap(template: str, *, listen: tuple[str, int], admin: tuple[str, int] | None, socket: str, lua: str) -> str:
    """`template`, the text of envoy/envoy.yaml, with only these values changed.

    `listen` and `admin` are IP address and port; port 0 takes a free one, `admin` None leaves the admin listener out.
    `socket` is where ext_authz listens: a path, or `HOST:PORT` with an IP address. `lua` is the path of the script.
    ValueError if the template lacks one of them.
    """
    config = yaml.safe_load(template)
    _set(config, ("static_resources", "listeners", "http", "address"), _tcp(listen))
    if admin is None:
        _at(config, ("admin",))
        del config["admin"]
    else:
        _set(config, ("admin", "address"), _tcp(admin))
    for cluster in ("ext_authz", "ext_authz_ads"):
        host = ("static_resources", "clusters", cluster, "load_assignment", "endpoints", 0, "lb_endpoints", 0)
        _set(config, (*host, "endpoint", "address"), _address(socket))
    scripts = list(_scripts(config))
    if not scripts:
        raise ValueError(f"the Envoy template loads no {SCRIPT}")
    for source in scripts:
        source["filename"] = lua
    return str(yaml.safe_dump(config, sort_keys=False, width=120))


def _set(config: Any, path: tuple[str | int, ...], value: Any) -> None:
    _at(config, path)
    _at(config, path[:-1])[path[-1]] = value


def _at(config: Any, path: tuple[str | int, ...]) -> Any:
    """The value at `path`; a name in a list means the item with that `name`."""
    found = config
    for step in path:
        try:
            if isinstance(found, list) and isinstance(step, str):
                found = next(item for item in found if item["name"] == step)
            else:
                found = found[step]
        except (KeyError, IndexError, TypeError, StopIteration):
            raise ValueError(f"the Envoy template has no {'.'.join(map(str, path))}") from None
    return found


def _scripts(node: Any) -> Iterator[dict[str, Any]]:
    """Every data source that names the script's file."""
    if isinstance(node, dict):
        name = node.get("filename")
        if isinstance(name, str) and PurePosixPath(name).name == SCRIPT:
            yield node
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _scripts(child)


def _tcp(address: tuple[str, int]) -> dict[str, Any]:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}


def _address(socket: str) -> dict[str, Any]:
    if "/" in socket:
        return {"pipe": {"path": socket}}
    host, _, port = socket.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"expected a path or HOST:PORT, found `{socket}`")
    return _tcp((host.strip("[]"), int(port)))
