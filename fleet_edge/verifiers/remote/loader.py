"""Loads the remote verifier as the edge's settings say."""

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fleet_edge.verifiers.contract import Verifier, VerifierError
from fleet_edge.verifiers.remote.errors import BadSetting
from fleet_edge.verifiers.remote.key import ApiKey
from fleet_edge.verifiers.remote.tokenizer import check_local, load_local, sample_tokens

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings

__all__ = ["check", "endpoint_urls", "load"]

_ENDPOINTS: Final = "remote.endpoints"


def check(settings: "EdgeSettings") -> None:
    """Check addresses, key and tokenizer, and that what asks the servers is installed.

    Raises:
        VerifierError: Something is wrong with them.
    """
    try:
        import httpx  # noqa: F401, PLC0415 - comes with the extra
    except ImportError as error:
        raise VerifierError(
            "The engine `remote` needs the extra `edge-remote`; install it: pip install 'dssd-fleet[edge-remote]'."
        ) from error
    endpoint_urls(settings.remote.endpoints)
    ApiKey(settings.remote.api_key_file)
    check_local(settings.target)


def load(settings: "EdgeSettings") -> Verifier:
    """Connect to the servers that the settings name, and have them prove that they serve the target.

    Raises:
        VerifierError: None of them does.
    """
    check(settings)
    from fleet_edge.verifiers.remote.connect import connect  # noqa: PLC0415 - only where it is installed

    local = load_local(settings.target)
    samples = sample_tokens(local.strings, local.end_tokens)
    return connect(settings.remote, local, endpoint_urls(settings.remote.endpoints), samples=samples)


def endpoint_urls(text: str) -> list[str]:
    """Return the addresses in a setting.

    Raises:
        VerifierError: There is none, or one is no address.
    """
    urls = [word.strip().rstrip("/").removesuffix("/v1") for word in text.split(",") if word.strip()]
    if not urls:
        raise BadSetting(
            "The engine `remote` needs the address of an inference server; set 'remote.endpoints', for example to "
            "http://10.0.0.5:8000.",
            setting=_ENDPOINTS,
        )
    for url in urls:
        _check_url(url)
    if len(set(urls)) < len(urls):
        raise BadSetting(
            "An address stands twice in 'remote.endpoints'; name every inference server once.", setting=_ENDPOINTS
        )
    return urls


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise BadSetting(
            f"{url!r} is no address of an inference server; write it as http://10.0.0.5:8000 or https://NAME.",
            setting=_ENDPOINTS,
        )
    if parts.username or parts.password:
        raise BadSetting(
            "An address in 'remote.endpoints' holds a name or password; put the key into a file and set "
            "'remote.api_key_file'.",
            setting=_ENDPOINTS,
        )
