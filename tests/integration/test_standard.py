"""LangChain's own suites for chat models, over a real provider class and over the same one with an aligner around it.

The provider class talks to a local server of its protocol, which answers as an obedient model would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumpd, load
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from openai_server import serve

from aligner_middleware import Aligner
from aligner_middleware.langchain.chat_model import AlignedChatModel
from tests.scripted_api import answer

pytestmark = [
    pytest.mark.enable_socket,
    # What langchain-openai, and the suites themselves, say of what the suites do.
    pytest.mark.filterwarnings("ignore:OpenAI may require a filename for file uploads:UserWarning"),
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:The function `load` is in beta"),
    pytest.mark.filterwarnings("ignore:LANGCHAIN_TESTS_USER_AGENT environment variable not set:UserWarning"),
]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with serve(answer) as url:
        yield url


class Served:
    """A model that is asked, not only made. The pictures and sounds that the suites download are a few bytes here."""

    @pytest.fixture(autouse=True)
    def _serve(self, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = base_url
        monkeypatch.setattr(httpx, "get", lambda *args, **kwargs: httpx.Response(200, content=b"some bytes"))


class Inner:
    """What the provider class supports here."""

    url = "http://localhost/v1"

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "scripted", "base_url": self.url, "api_key": "none"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"OPENAI_API_KEY": "a key"}, {"model": "scripted"}, {"openai_api_key": "a key"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_pdf_inputs(self) -> bool:
        return True

    @property
    def supports_audio_inputs(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_pdf_tool_message(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "scripted-2"


class Wrapped(Inner):
    """The same, with the default aligner around it."""

    @pytest.fixture(autouse=True)
    def _align(self, aligner: Aligner) -> None:
        self.aligner = aligner

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return AlignedChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        params = {**super().chat_model_params, "temperature": 0, "max_tokens": 100, "timeout": 60, "max_retries": 2}
        return {"llm": ChatOpenAI(**params), "aligner": self.aligner}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment, params, attributes = super().init_from_env_params
        with mock.patch.dict(os.environ, environment):
            return environment, {"llm": ChatOpenAI(**params), "aligner": self.aligner}, attributes

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {}  # they are the inner model's


class TestInnerUnit(Inner, ChatModelUnitTests):
    pass


class TestInnerIntegration(Served, Inner, ChatModelIntegrationTests):
    pass


class TestWrappedUnit(Wrapped, ChatModelUnitTests):
    @pytest.mark.xfail(reason="the suite's loader takes LangChain's own classes only; see the test below", strict=True)
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)

    def test_it_is_loaded_as_it_was_dumped(self, model: BaseChatModel) -> None:
        with mock.patch.dict(os.environ, {"OPENAI_API_KEY": "a key"}):
            loaded = load(
                dumpd(model),
                valid_namespaces=["aligner_middleware"],
                allowed_objects=[AlignedChatModel, ChatOpenAI],
                secrets_from_env=True,
            )
        assert loaded.asdict() == model.asdict()


class TestWrappedIntegration(Served, Wrapped, ChatModelIntegrationTests):
    pass
