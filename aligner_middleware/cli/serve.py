"""`aligner serve`: the aligner as a service over HTTP."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from aligner_middleware.cli.options import Given, options_from
from aligner_middleware.cli.output import write
from aligner_middleware.errors import ConfigError, MissingExtraError
from aligner_middleware.serve.settings import CONFIG_VARIABLE, PREFIX, KeySettings, PolicySettings, ServeSettings

_POLICY = {name: [f"policy.{name}"] for name in PolicySettings.model_fields}
_NEEDED = ("fastapi", "httpx2", "pydantic_settings", "uvicorn", "yaml")
_HEALTHY = 60  # seconds in which a process has to show that it lives; on a busy machine its start takes some


@options_from(ServeSettings, "given", _POLICY, without=("keys", "upstream_key", "audit_key"), as_given=True)
def serve(
    given: Given,
    config: Annotated[
        Path | None,
        typer.Option(help=f"YAML file of settings, named as here with underscores. By default {CONFIG_VARIABLE}."),
    ] = None,
    new_key: Annotated[
        str | None,
        typer.Option(help="Only make an API key for a client of this name, and print it with its lines of YAML."),
    ] = None,
) -> None:
    """Serve the aligner over HTTP: OpenAI's API before any chat model, with its answers corrected.

    Options come before environment variables (`ALIGNER_SERVE_PORT`, `ALIGNER_SERVE_POLICY__STRENGTH`, …), and these before
    the YAML file. Secrets are given only there: API keys, of clients (`keys`) and of the upstream (`upstream_key`), and the
    key of the audit log's digests (`audit_key`).
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(f"aligner serve ({', '.join(missing)})", "serve")
    if new_key is not None:
        _print_key(new_key)
        return
    _run(_settings(given, config or _config_of_environment()))


def _config_of_environment() -> Path | None:
    name = os.environ.get(CONFIG_VARIABLE)
    return Path(name) if name else None


def _print_key(name: str) -> None:
    from aligner_middleware.serve.keys import new_key

    key, digest = new_key()
    try:
        KeySettings(name=name, sha256=digest)
    except ValidationError as exc:
        reason = f"{name!r}: {exc.errors()[0]['msg']}"
        raise typer.BadParameter(reason, param_hint="--new-key") from exc
    write(f'{key}\n\nkeys:\n  - name: "{name}"\n    sha256: "{digest}"')


def _settings(given: Given, file: Path | None) -> ServeSettings:
    """Read the settings.

    Raises:
        BadParameter: If the value of an option is refused.
        ConfigError: If a value of the environment or of the file is, or the file cannot be read.
    """
    from pydantic_settings import SettingsError
    from yaml import YAMLError

    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: there is no such file of settings")
    try:
        return ServeSettings.load(file, given.content)
    except ValidationError as exc:
        if (refused := given.refused(exc)) is not None:
            raise refused from exc
        raise ConfigError(_refused(exc, file)) from exc
    except SettingsError as exc:
        raise ConfigError(f"{exc}: lists in environment variables are JSON") from exc
    except (YAMLError, UnicodeDecodeError, ValueError, TypeError) as exc:
        raise ConfigError(f"{file}: it is no YAML of settings by name: {' '.join(str(exc).split())}") from exc


def _refused(exc: ValidationError, file: Path | None) -> str:
    """Say which value is refused, and where it stands: its environment variable where there is one, else the file."""
    error = exc.errors()[0]
    names = [str(part) for part in error["loc"]]
    variables = [PREFIX + "__".join(names[:end]).upper() for end in range(len(names), 0, -1)]
    place = next((name for name in variables if name in os.environ), str(file) if file else "the settings")
    kind = error["type"]
    secret = "key" in names[0] or kind in ("missing", "extra_forbidden")
    value = "" if secret else f" is {error['input']!r:.80}"
    return f"{place}: {'.'.join(names)}{value}: {error['msg'].removeprefix('Value error, ')}"


def _run(settings: ServeSettings) -> None:
    import uvicorn

    from aligner_middleware.serve.connections import CONNECTION
    from aligner_middleware.serve.local import check_local
    from aligner_middleware.serve.worker import FACTORY, handed_over, try_worker

    if settings.upstream is None:
        check_local()
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "timeout_graceful_shutdown": round(settings.drain),
        "access_log": False,
        "server_header": False,
        "http": CONNECTION,
        "ws": "none",
        "log_level": "info",
    }
    if settings.workers == 1:
        from aligner_middleware.serve.app import create_app
        from aligner_middleware.serve.service import load_aligner

        with load_aligner(settings) as aligner:  # an error is told before anything is served
            uvicorn.run(create_app(settings, aligner), **options)
        return
    with handed_over(settings):
        try_worker()
        uvicorn.run(FACTORY, factory=True, workers=settings.workers, timeout_worker_healthcheck=_HEALTHY, **options)
