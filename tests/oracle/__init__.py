"""A second reading of docs/policy.md and docs/tokens.md that shares no code with ext_authz, and a test that compares
the two on random policies, tokens and requests.

`answers.Oracle` is the reading; `caller`, `names` and `verdict` are its parts. `policies`, `tokens` and `requests` make
the cases, `server` asks ext_authz, `runs` compares, and `shrink` reduces a difference to its smallest form.
"""
