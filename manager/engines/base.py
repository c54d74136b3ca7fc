"""What both engines share: Docker's client and its errors, the check of the data path, the backends' image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import docker
import docker.errors

from core.engine import Engine, EngineError, TakenOver
from core.settings import Settings
from core.workers import WORKERS
from engines import path_probe
from engines.options import BalancerOptions

API_TIMEOUT = 30  # seconds for one call of the Engine API
CALLS_MAX = 2 * WORKERS + 1  # at a time: both pools of workers, and the loop's list


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turns every error of Docker's SDK into an EngineError."""
    try:
        yield
    except (EngineError, TakenOver):
        raise
    except docker.errors.APIError as error:
        raise EngineError(str(error.explanation or error)) from error
    # The SDK also raises the errors of its own dependencies, and KeyError for an unexpected answer.
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error


class BaseEngine(Engine):
    """An engine behind Docker's API, through its Unix socket or DOCKER_HOST."""

    def __init__(self, settings: Settings, balancer_options: BalancerOptions) -> None:
        self._settings, self._balancer_options = settings, balancer_options
        self._check_targets: list[path_probe.Target] = []  # of the balancers in the last list
        with engine_errors():
            self._client = docker.from_env(timeout=API_TIMEOUT, max_pool_size=CALLS_MAX)

    @abstractmethod
    def gateway(self) -> str:
        """The address of this host at which the balancers reach the manager."""

    def check_path(self) -> Mapping[str, str]:
        return path_probe.check(self._check_targets, self.gateway())

    def _image(self) -> tuple[Mapping[str, Any], str]:
        """The backends' image as the API describes it, and the user that it names (may be empty)."""
        image = self._client.api.inspect_image(self._settings.image)
        return image, str(image["Config"].get("User") or "")
