"""The Secure Routing Proxy's decision server, beside Envoy: who may reach which expert.

A request: CheckRequest bytes → `wire.check` → `core.check` → `wire.check` → CheckResponse bytes, against one immutable
`core.snapshot.Snapshot`, in `serve.authorization`. A policy edit: `serve.control`.

    cli                                             the command line
    serve | demo                                    the server process | the proxy on one laptop
    review                                          explain, test, diff, replay, shadow
    observe                                         counts, logs, status
    policyfile | wire | sources | settings          text → Policy | Envoy's messages | keys and files | flags
    core                                            the decision

A room imports only from the floors below its own. docs/architecture.md is the whole map.
"""

__version__ = "0.1.0"
