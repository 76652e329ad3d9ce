"""Sample experts: model servers that do no work, for the demo, the benchmarks and the tests of the proxy.

Start one with `python -m experts --help`; run many inside one process with `experts.service.make_app`.
"""
