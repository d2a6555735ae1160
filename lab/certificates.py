"""A CA, and what it signs for etcd and for etcd's clients."""

from collections.abc import Sequence
from pathlib import Path

from lab.process import run


class Certificates:
    """A CA, a certificate for etcd and one for its clients, without CN as etcd's gateway wants it.

    :param addresses: at which etcd serves.
    :param usage: what etcd's certificate is good for; its gateway is a client of etcd itself.
    """

    def __init__(
        self, folder: Path, addresses: Sequence[str] = ("127.0.0.1",), usage: str = "serverAuth,clientAuth"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.ca = folder / "ca.crt"
        self._make("ca", "-addext", "basicConstraints=critical,CA:TRUE")
        names = ",".join(f"IP:{address}" for address in addresses)
        self.server = self._signed("server", f"extendedKeyUsage={usage}", f"subjectAltName={names}")
        self.client = self._signed("client", "extendedKeyUsage=clientAuth")

    def client_with_name(self) -> tuple[Path, Path]:
        return self._signed("named", "extendedKeyUsage=clientAuth", subject="/O=weft/CN=weft")

    def _signed(self, name: str, *extensions: str, subject: str = "") -> tuple[Path, Path]:
        options = [option for extension in extensions for option in ("-addext", extension)]
        signer = ["-CA", str(self.ca), "-CAkey", str(self.ca.with_suffix(".key"))]
        return self._make(name, *signer, "-addext", "basicConstraints=CA:FALSE", *options, subject=subject)

    def _make(self, name: str, *options: str, subject: str = "") -> tuple[Path, Path]:
        crt, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        subject = subject or f"/O=weft {name}"
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", subject]
        run(["openssl", "req", "-x509", *kind, "-days", "2", "-out", str(crt), "-keyout", str(key), *options])
        return crt, key
