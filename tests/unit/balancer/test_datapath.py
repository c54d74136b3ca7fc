"""The data path that the manager describes in the balancer's environment."""

from __future__ import annotations

import pytest

from datapath import OWN_NAMESPACE, DataPath, from_environment


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({}, OWN_NAMESPACE),
        ({"LB_PORTS": "8000:9090", "LB_STICKY": "60"}, DataPath(((8000, 9090),), sticky=60)),
        ({"LB_PORTS": "8000:80,8001:443"}, DataPath(((8000, 80), (8001, 443)))),
        (
            {
                **{"LB_PORTS": "80:8080", "LB_PREFIX": "LB-0a1b2c-", "LB_BRIDGE": "br0"},
                **{"LB_SUBNET": "198.18.0.0/20", "LB_ADDRESS": "198.19.0.1", "LB_STICKY": "0"},
            },
            DataPath(((80, 8080),), "LB-0a1b2c-", "br0", "198.18.0.0/20", "198.19.0.1"),
        ),
    ],
)
def test_variables_describe_the_data_path(environ: dict[str, str], path: DataPath) -> None:
    assert from_environment(environ) == path
    assert path.on_host == ("LB_BRIDGE" in environ)


@pytest.mark.parametrize("ports", ["", "8000", "80-8080", "80:8080,", "80:http", "80:8080:1"])
def test_malformed_list_of_ports_is_an_error(ports: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|int\(\)"):
        from_environment({"LB_PORTS": ports})
