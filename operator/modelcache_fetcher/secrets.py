"""Credentials as files, with the keys that Truss's users know. Read anew at each call, so that rotation works.

Nothing here is ever logged, put into an error, into the environment or on a command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError

HF_TOKEN = "hf_access_token"  # noqa: S105 - a key's name
S3_CREDENTIALS = "s3_credentials.json"
SERVICE_ACCOUNT = "service_account.json"


@dataclass(frozen=True, slots=True)
class Secrets:
    """The folder where a Secret is mounted (one file per key), or the lack of one.

    Attributes:
        folder: The mounted folder; None without a secret.
        name: spec.secretRef.name, for messages; None if the spec names no secret: then a missing key is no error.
    """

    folder: Path | None = None
    name: str | None = field(default=None)

    def read(self, key: str) -> str | None:
        """The stripped content of one key; None if no secret is asked for.

        Raises:
            FetchError: SecretMissing, naming Secret and key.
        """
        if self.folder is not None:
            try:
                text = (self.folder / key).read_text(encoding="utf-8").strip()
            except (FileNotFoundError, NotADirectoryError):
                text = ""
            except (OSError, UnicodeDecodeError) as error:
                raise FetchError(
                    Reason.SECRET_MISSING,
                    f"The key {key!r} of Secret {self._label} cannot be read ({type(error).__name__}).",
                ) from None
            if text:
                return text
        if self.name is None:
            return None
        raise FetchError(
            Reason.SECRET_MISSING,
            f"Secret {self._label} has no key {key!r}, which this source needs; create it, for example with "
            f"`kubectl create secret generic {self.name} --from-file={key}=FILE`, or remove secretRef if the source is "
            "public.",
        )

    @property
    def _label(self) -> str:
        return repr(self.name) if self.name else "(the mounted folder)"
