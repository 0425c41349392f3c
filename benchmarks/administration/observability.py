"""Observability: what the session log, metrics and a dashboard cost an edge, as a ratio of tokens a second.

Two edges over the same model share one core, in turns. One has a session log of every round in SQLite, metrics that
are scraped each second, and a dashboard whose pages somebody opens; the other has none of these. The same devices play
the same drafts to either, on the other core. Coupled texts are the same each time, so both edges compute the same.
Rounds alternate in pairs; the ratio is the pairs' geometric mean. Takes 5 minutes.
"""

import argparse
import itertools
import re
import secrets
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from benchmarks.fleet_load import FleetLoad
from benchmarks.harness import Bench, SuiteReport, at_least, edge_only_pacing, free_address, number_of, say, table
from benchmarks.recordings import record_laws
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_admin.models.prompts import built_in, some
from fleet_admin.steering import Actor
from fleet_cli.main import main
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_edge.session_log.writer import LogWriter
from schemas.errors import FleetError
from tests.support.edge_thread import NoLog
from tests.support.processes import edge_process
from tests.support.recorded_drafter import RecordedText

_GOAL: Final = 0.97
_TEXTS, _TOKENS, _DRAFT = 6, 64, 4
_SCRAPE_S, _PAGE_S = 1.0, 2.0
_PAGES: Final = ("/", "/devices", "/sessions", "/edges", "/usage", "/alerts")
_CSRF: Final = re.compile(r'name="csrf" value="([0-9a-f]+)"')
_PASSWORD: Final = "of a benchmark alone"  # noqa: S105 - of a database that ends with it


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="(default: %(default)s)")
    parser.add_argument("--devices", type=number_of(int, 1), default=16, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=number_of(int, 2), default=8, help="of rounds, for each plan")


def run(bench: Bench) -> SuiteReport:
    devices = bench.options.devices
    target = bench.target()
    laws = record_laws(bench, bench.options.draft, some(built_in(), -(-_TEXTS // 6)), tokens=_TOKENS)
    texts = [laws.laws[n % len(laws.laws)].written(n % len(laws.laws)) for n in range(devices)]
    codec = GgufModel(target, vocabulary_only=True)
    plans: dict[str, Pacing] = {"draft": FixedPacing(_DRAFT), "edge-only": edge_only_pacing()}
    with closing(codec), ExitStack() as stack:
        brokers = [stack.enter_context(bench.broker()) for _ in range(2)]
        say("starting two edges")
        module = "benchmarks.administration.observability"
        stack.enter_context(bench.edge(brokers[0].port, target, module=module))
        answered = stack.enter_context(_observed(bench, brokers[1].port, target))
        without, observed = (
            stack.enter_context(
                FleetLoad(each.port, bench.fleet, codec, codec.vocabulary, devices=devices, token_s=0.0)
            )
            for each in brokers
        )
        rows = [_compare(bench, plan, pacing, without, observed, texts) for plan, pacing in plans.items()]
    table(rows, {"plan": "", "without": ".1f", "observed": ".1f", "ratio": ".3f", "standard_error": ".3f"})
    goals = [at_least(f"tokens a second with log, metrics and dashboard, {r['plan']}", r["ratio"], _GOAL) for r in rows]
    return SuiteReport(rows, goals, more={"answered": answered})


def _compare(
    bench: Bench, plan: str, pacing: Pacing, without: FleetLoad, observed: FleetLoad, texts: Sequence[RecordedText]
) -> dict[str, Any]:
    loads = {"without": without, "observed": observed}
    rates: dict[str, list[float]] = {name: [] for name in loads}
    for load in loads.values():
        load.pace([pacing for _ in texts])
        load.write(texts)  # prompts are computed once
    for number in range(bench.options.pairs):
        say(f"{plan}, pair {number + 1} of {bench.options.pairs}")
        for name in sorted(loads, reverse=bool(number % 2)):
            rates[name].append(loads[name].write(texts).tokens_per_s)
    logs = np.log(np.array(rates["observed"]) / np.array(rates["without"]))
    return {
        "plan": plan,
        **{name: float(np.mean(own)) for name, own in rates.items()},
        "ratio": float(np.exp(logs.mean())),
        "standard_error": float(logs.std(ddof=1) / np.sqrt(len(logs))),
        "tokens_per_s": rates,
    }


@contextmanager
def _observed(bench: Bench, port: int, target: Path) -> Iterator[dict[str, int]]:
    """Run the observed edge; yield how often metrics and pages were read."""
    folder, metrics, dashboard = bench.new_folder(), free_address(), free_address()
    db = f"sqlite:///{folder}/log.sqlite3"
    settings = folder / "edge.toml"
    settings.write_text(
        f'fleet = "{bench.fleet}"\ntarget = "{target.resolve()}"\nengine = "llama.cpp"\n'
        f'threads = {len(bench.cores.edge)}\ndb = "{db}"\nspool = "{folder}/spool"\ndashboard = "{dashboard}"\n'
        f'[broker]\nport = {port}\n[metrics]\nlisten = "{metrics}"\n',
        encoding="utf-8",
    )
    with ExitStack() as stack:
        stack.enter_context(edge_process(["--config", str(settings)], cores=bench.cores.edge))
        viewer = Viewer(f"http://{dashboard}", open_services(DashboardSettings(db=db)))
        paths = itertools.cycle(_PAGES)
        answered = {"metrics": 0, "pages": 0}
        stack.enter_context(_again("metrics", lambda: _get(f"http://{metrics}/metrics"), _SCRAPE_S, answered))
        stack.enter_context(_again("pages", lambda: viewer.look(next(paths)), _PAGE_S, answered))
        yield answered


@contextmanager
def _again(name: str, ask: Callable[[], object], every_s: float, answered: dict[str, int]) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            ask()
            answered[name] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _get(address: str) -> None:
    with urllib.request.urlopen(address) as response:  # noqa: S310 - on loopback
        response.read()


class Viewer:
    def __init__(self, address: str, services: Services) -> None:
        self._address = address.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        account = f"viewer-{secrets.token_hex(4)}"  # a database that is kept may have that of an earlier run
        services.accounts.add(account, role=AccountRole.VIEWER, password=_PASSWORD, actor=Actor("bench"))
        found = _CSRF.search(self.look("/login"))
        if found is None:
            raise FleetError("The dashboard has no form to log in.")
        form = {"csrf": found[1], "account": account, "password": _PASSWORD, "next": ""}
        request = urllib.request.Request(  # noqa: S310 - the dashboard's own address
            f"{self._address}/login", urllib.parse.urlencode(form).encode(), {"Origin": self._address}
        )
        with self._opener.open(request) as response:
            response.read()

    def look(self, path: str) -> str:
        with self._opener.open(f"{self._address}{path}") as response:
            text: str = response.read().decode()
        return text


if __name__ == "__main__":  # `fleet` without a session log, which no setting allows
    with patch.object(LogWriter, "put", NoLog.put):
        main()
