"""envoy/envoy.yaml as it is, and as it is moved to another place."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ext_authz.wire.bootstrap import bootstrap, envoy_file

TEMPLATE = envoy_file("envoy.yaml").read_text()
PLACE: dict[str, Any] = {
    "listen": ("127.0.0.1", 0), "admin": ("127.0.0.1", 1), "socket": "/tmp/srp.sock",
    "lua": str(envoy_file("least_request.lua")),
}  # fmt: skip


def moved(**changes: Any) -> Any:
    return yaml.safe_load(bootstrap(TEMPLATE, **PLACE | changes))


def authz_address(config: Any) -> Any:
    """Where Envoy finds ext_authz, both for checks and for its configuration."""
    decides, configures = (
        next(c for c in config["static_resources"]["clusters"] if c["name"] == name)["load_assignment"]["endpoints"]
        for name in ("ext_authz", "ext_authz_ads")
    )
    assert decides == configures
    return decides[0]["lb_endpoints"][0]["endpoint"]["address"]


# ---- another place ----


def test_the_file_is_made_for_a_pod() -> None:
    config = yaml.safe_load(TEMPLATE)
    (listener,) = config["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 9000}
    assert config["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
    assert authz_address(config) == {"pipe": {"path": "/run/srp/ext_authz.sock"}}
    assert TEMPLATE.count("/etc/envoy/least_request.lua") == 2


def test_only_the_places_change() -> None:
    back = moved(
        listen=("0.0.0.0", 9000), admin=("127.0.0.1", 9901), socket="/run/srp/ext_authz.sock",
        lua="/etc/envoy/least_request.lua",
    )  # fmt: skip
    assert back == yaml.safe_load(TEMPLATE)


def test_the_admin_listener_can_be_left_out() -> None:
    assert "admin" not in moved(admin=None)


@pytest.mark.parametrize(
    ("socket", "address"),
    [
        ("/run/x.sock", {"pipe": {"path": "/run/x.sock"}}),
        ("./x.sock", {"pipe": {"path": "./x.sock"}}),
        ("127.0.0.1:9191", {"socket_address": {"address": "127.0.0.1", "port_value": 9191}}),
        ("[::1]:9191", {"socket_address": {"address": "::1", "port_value": 9191}}),
    ],
)
def test_ext_authz_may_listen_on_a_path_or_an_address(socket: str, address: dict[str, Any]) -> None:
    assert authz_address(moved(socket=socket)) == address


BROKEN = [
    ("name: http\n", "name: web\n", "has no static_resources.listeners.http.address"),
    ("admin:\n", "nimda:\n", "has no admin.address"),
    ("- name: ext_authz #", "- name: other #", "has no static_resources.clusters.ext_authz.load_assignment"),
    ("lb_endpoints:", "endpoints:", "has no static_resources.clusters.ext_authz.load_assignment.endpoints.0.lb"),
    ("least_request.lua", "most_request.lua", "loads no least_request.lua"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_a_template_in_which_a_place_is_missing_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(TEMPLATE.replace(old, new), **PLACE)


def test_a_socket_that_is_neither_path_nor_address_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a path or HOST:PORT, found `nonsense`"):
        moved(socket="nonsense")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"envoy/no\.such is not installed"):
        envoy_file("no.such")


# ---- the file itself ----


def test_no_route_passes_without_ext_authz() -> None:
    config = yaml.safe_load(TEMPLATE)
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    names = [f["name"] for f in manager["http_filters"]]
    assert names == ["srp.lease", *(f"envoy.filters.http.{name}" for name in ("ext_authz", "lua", "router"))]
    assert "typed_per_filter_config" not in TEMPLATE
    assert "filter_enabled:" not in TEMPLATE
    switch = manager["http_filters"][1]["typed_config"]["filter_enabled_metadata"]
    assert switch == {"filter": "srp.lease", "path": [{"key": "hit"}], "value": {"bool_match": True}, "invert": True}
    assert TEMPLATE.count("srp.lease") == 2  # no other filter names it, so no other writes to it
    (host,) = manager["route_config"]["virtual_hosts"]
    assert host["domains"] == ["*"]
    for route in host["routes"]:
        assert set(route) == {"match", "route"}
        assert "inline_cluster_specifier_plugin" in route["route"]
        assert "cluster" not in route["route"]
    names = ["ext_authz", "ext_authz_ads", "ext_authz_workers", "ext_authz_any"]
    assert [c["name"] for c in config["static_resources"]["clusters"]] == names
    assert "clearRouteCache" not in envoy_file("least_request.lua").read_text()


def test_no_number_of_checks_delays_the_configuration() -> None:
    """A circuit breaker belongs to a cluster: the configuration's stream has a cluster that no check uses."""
    config = yaml.safe_load(TEMPLATE)
    clusters = {c["name"]: c for c in config["static_resources"]["clusters"]}
    (service,) = config["dynamic_resources"]["ads_config"]["grpc_services"]
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    asked = manager["http_filters"][1]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"]
    any_of = clusters[asked]["cluster_type"]["typed_config"]["clusters"]
    assert service["envoy_grpc"]["cluster_name"] not in (asked, *any_of)
    assert "circuit_breakers" not in clusters[service["envoy_grpc"]["cluster_name"]]
