"""The manager's certificate, as manager/cli/swarm.py makes it: for tests and benchmarks of what runs within TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_certificate(place: Path, name: str = "lbscaler-manager") -> Path:
    """manager.pem in the folder `place`: certificate and key in one file. Needs openssl."""
    place.mkdir(exist_ok=True)
    pem, key = place / "manager.pem", place / "key.pem"
    subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    files = ("-keyout", str(key), "-out", str(pem))
    subprocess.run(
        ["openssl", "req", "-x509", *NEW_KEY, "-days", "2", *subject, *files], check=True, capture_output=True
    )
    pem.write_text(pem.read_text() + key.read_text())
    return pem
