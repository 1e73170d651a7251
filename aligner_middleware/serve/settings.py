"""The settings of the service: from options, the environment (`ALIGNER_SERVE_…`), and one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from aligner_middleware.artifact import Precision
from aligner_middleware.data.triples import LONGEST_INSTRUCTION
from aligner_middleware.strength import OnDoubt, Strength

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

PREFIX = "ALIGNER_SERVE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"


class PolicySettings(BaseModel):
    """When and how answers are corrected; the meaning of each is that of the options of `AlignerRunnable`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: Strength = Field(
        "medium", description="low, medium or high; or the score above which an answer is corrected."
    )
    mode: Literal["correct", "shadow"] = Field(
        "correct", description="`shadow` decides and reports, and changes nothing."
    )
    by_sentence: bool = Field(
        False,
        description="Whether a stream sends sentences as soon as the answer up to their end is kept; they stay.",
    )
    on_doubt: OnDoubt = Field(
        "passthrough", description="Result where a safeguard objects: the original answer, an error, or the correction."
    )
    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="How to correct, for an aligner that was trained with instructions, such as `more empathic`.",
    )
    on_error: Literal["raise", "passthrough"] = Field(
        "raise", description="Result where a correction fails: an error, or the original answer."
    )
    overrides: bool = Field(
        True,
        description="Whether a request to `/v1/correct`, or the page, may give its own strength, instruction or mode.",
    )
    keep_texts: bool = Field(
        False, description="Whether questions and answers go to the audit log and the page's live log."
    )

    @model_validator(mode="after")
    def _holds_back(self) -> Self:
        if self.by_sentence and self.mode == "shadow":
            raise ValueError(
                "by_sentence has no meaning in mode shadow, which holds no text back: leave one of them out"
            )
        return self


class KeySettings(PolicySettings):
    """An API key of a client, and its policy. Only the key's hash is stored: `aligner serve --new-key` makes both."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$", description="Its name in logs and metrics.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal.")


class ServeSettings(BaseModel):
    """All settings of `aligner serve`. `load` also reads the environment and a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(1, ge=1, le=64, description="Processes; each loads an aligner of its own.")
    model: str = Field("default", description="`default`, an exported folder, a checkpoint's folder, or a hub id.")
    precision: Precision | None = Field(
        None, description="Precision of the weights; by default int8, or the folder's own."
    )
    threads: int | None = Field(None, ge=1, description="Threads of one pass; by default all cores.")
    aligner_url: tuple[str, ...] = Field(
        (),
        description="Addresses of servers that run the aligner, such as http://gpu:8000/v1, with ALIGNER_API_KEY as their "
        "key; `model` is the same aligner here, for its tokenizer and thresholds, or `prompted`. By default it runs here.",
    )
    aligner_url_model: str | None = Field(
        None, description="Name that these servers give the model; by default the first that they serve."
    )
    upstream: str | None = Field(
        None,
        description="Base URL of the chat model's API, such as https://api.openai.com/v1. By default a small local model.",
    )
    upstream_key: SecretStr | None = Field(
        None,
        description="API key of the upstream; by default the client's own key is handed on where no `keys` are set.",
    )
    upstream_timeout: float = Field(
        600, gt=0, description="Seconds that the upstream may take, or be silent in a stream."
    )
    policy: PolicySettings = Field(PolicySettings(), description="Policy of clients without a key of their own.")
    keys: tuple[KeySettings, ...] = Field(
        (), description="API keys; where there are any, a request without one is refused."
    )
    correction_timeout: float = Field(60, gt=0, description="Seconds that a correction may take.")
    max_body: int = Field(4 * 2**20, ge=1024, description="Largest request, in bytes.")
    body_timeout: float = Field(
        30, gt=0, description="Seconds in which a request's headers have to arrive, and then its body."
    )
    concurrency: int = Field(256, ge=1, description="Requests that are served at once; more get status 429.")
    longest_wait: float = Field(
        30,
        gt=0,
        description="Seconds that an answer may wait for the aligner; where it would be more, requests get status 429.",
    )
    keep_alive: float = Field(10, gt=0, description="Seconds of silence in a stream after which a comment is sent.")
    audit: Path | None = Field(None, description="SQLite file of the audit log; by default there is none.")
    audit_rows: int = Field(1_000_000, ge=1, description="Rows that the audit log keeps; older ones are deleted.")
    audit_key: SecretStr | None = Field(
        None,
        min_length=16,
        description="Secret by which the audit log's digests of texts are keyed; by default a new one at each start.",
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins of web pages that may call the service.")
    page: bool = Field(True, description="Whether `/` shows the page.")
    drain: float = Field(30, ge=0, description="Seconds in which running requests may end when the service stops.")

    @field_validator("upstream")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://, such as https://api.openai.com/v1")
        return url.rstrip("/") if url else None

    @field_validator("keys")
    @classmethod
    def _are_apart(cls, keys: tuple[KeySettings, ...]) -> tuple[KeySettings, ...]:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in keys]
            if len(values) != len(set(values)):
                raise ValueError(f"two keys have the same {field}")
        return keys

    @classmethod
    def load(cls, file: Path | None, options: dict[str, Any]) -> ServeSettings:
        """Read the settings: options come before the environment, and that before the file.

        Args:
            file: A YAML file, or `None`.
            options: Values by name, of those options that were given.

        Raises:
            ValidationError: If a value does not fit, or a name is unknown.
        """
        # Whoever only names the settings, as the command line does, needs no pydantic-settings.
        from pydantic_settings import BaseSettings, SettingsConfigDict, YamlConfigSettingsSource

        class Loaded(BaseSettings, cls):  # type: ignore[misc, valid-type]
            model_config = SettingsConfigDict(
                env_prefix=PREFIX,
                env_nested_delimiter="__",
                extra="forbid",
                frozen=True,
                nested_model_default_partial_update=True,
            )

            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                yaml = [YamlConfigSettingsSource(settings_cls, file)] if file else []
                return (init_settings, env_settings, *yaml)

        loaded: ServeSettings = Loaded(**options)
        return loaded
