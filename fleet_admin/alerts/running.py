"""Alerts at work: an evaluator with those who are told, as the settings have it."""

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from fleet_admin.alerts.alerts import Alerts
from fleet_admin.alerts.courier import Channel, Courier
from fleet_admin.alerts.evaluator import Evaluator
from fleet_admin.alerts.publishing import BrokerChannel
from fleet_admin.alerts.settings import AlertSettings
from fleet_admin.alerts.views import AlertView
from fleet_admin.alerts.webhook import Webhook
from fleet_runtime.metrics.settings import read_token

__all__ = ["RunningAlerts"]

_log = logging.getLogger(__name__)

_END_S: Final = 5.0


class RunningAlerts:
    """Evaluates alerts and has them told: step by step, or on a thread of its own between `start` and `close`.

    Args:
        alerts: The table, open to write.
        settings: Thresholds, and who is told.
        channels: Who is told besides.
        now: The wall clock (aware).

    Raises:
        MetricsError: The secret's file cannot be used.
    """

    def __init__(
        self,
        alerts: Alerts,
        settings: AlertSettings,
        *,
        channels: Sequence[Channel] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._broker = None if settings.fleet is None else BrokerChannel(settings)
        self._courier = Courier([*channels, *_webhooks(settings), *([self._broker] if self._broker else [])])
        self._evaluator = Evaluator(alerts, settings, tell=self._courier.tell, now=now)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._evaluator.run, args=(self._stop,), name="alert-rules", daemon=True)

    def step(self) -> list[AlertView]:
        """Look once; return what was opened or ended, nothing where another process evaluates."""
        return self._evaluator.step() or []

    def start(self) -> Self:
        """Look every `every_s`, on a thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """End, after a last attempt to tell what waits."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_END_S)
        self._courier.close(_END_S)
        if self._broker is not None:
            self._broker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _webhooks(settings: AlertSettings) -> list[Webhook]:
    if not settings.webhook:
        return []
    secret = settings.webhook_secret_file
    return [Webhook(settings.webhook, secret=None if secret is None else read_token(secret.expanduser()))]
