"""Run requests with a client of one's own: from docs/protocol.md and docs/formulas.md, with nothing of this project.

    python examples/reference_client.py vocabulary.json --fleet home --mode coupled --seed 7 --tokens 40

`vocabulary.json` is the list of the target's token strings. Each text is a line of JSON. A token is drafted by
what followed the one before it so far: a poor draft, and the output is the large model's all the same.
"""

import argparse
import contextlib
import itertools
import json
import secrets
import sys
from pathlib import Path

import numpy as np
from reference_formulas import DRAFT, correct, couple, digest, fingerprint, invert, quantize, shape, uniform
from reference_link import Map, ReferenceLink, SessionLostError, pack

NOT_COUNTED = dict.fromkeys(("drafted", "tested", "accepted", "rounds", "uplink_bytes", "downlink_bytes"), 0)
NOT_TIMED = dict.fromkeys(("draft_ms", "wait_ms", "wall_ms"), 0.0)


def propose(text: list[int], size: int, policy: Map, position: int) -> tuple[int, dict[int, int]]:
    """Draft a token by what has followed the last one before; return it with the counts that it was drawn from."""
    followed = [after for before, after in itertools.pairwise(text) if before == text[-1]]
    q = shape(np.log1p(np.bincount(followed, minlength=size)).tolist(), policy)
    if policy["mode"] == "coupled":
        return couple(q, policy["seed"], position), {}
    counts = quantize(q)
    return invert(counts, uniform(policy["seed"], position, DRAFT)), counts


class Text:
    """A text and its session.

    Attributes:
        tokens: What is committed.
        fix: The last correction, until a draft has carried it.
        target: Identity of the large model that the tokens are of.
        rounds: Numbers of the drafts.
    """

    def __init__(self, link: ReferenceLink, job: Map, prompt: list[int], length: int) -> None:
        """Take the fields of an Open, the prompt, and the most tokens of a draft."""
        self.link, self.prompt, self.length, self.session = link, prompt, length, secrets.token_bytes(8)
        self.job = job | {"kind": "open", "session": self.session, "prompt": pack(prompt)}
        self.tokens, self.rounds, self.fix, self.target = list[int](), itertools.count(), None, b""

    def write(self) -> Map:
        """Run the request, and close its session whatever comes."""
        opened, reason = None, "failed"
        try:
            for attempt in range(20):
                self.link.ours = {"session": self.session, "attempt": attempt, "handle": None}
                resume = {"resume": pack(self.tokens)} if attempt else {}
                resume |= {"target_id": self.target} if self.tokens else {}
                wanted = {"kind": "opened", "session": self.session, "attempt": attempt}
                with contextlib.suppress(SessionLostError):
                    opened = self.link.ask("up/open", self.job | {"attempt": attempt} | resume, wanted, again_s=1.0)
                    self.link.ours["handle"], self.target = opened["handle"], opened["target_id"]
                    reason = self.draft(opened)
                    return {"tokens": self.tokens, "reason": reason, "rounds": next(self.rounds)}
            raise TimeoutError("The session was lost 20 times.")
        finally:
            if opened is not None:
                self.close(opened, reason)

    def close(self, opened: Map, reason: str) -> None:
        """Say how the request has ended, and wait a little for the edge's word on it."""
        close = {"kind": "close", "session": self.session, "handle": opened["handle"], "edge": opened["edge"]}
        close |= {"reason": reason, "tokens": len(self.tokens), "digest": digest(self.tokens)}
        close |= NOT_COUNTED | NOT_TIMED | ({} if self.fix is None else {"fix": self.fix})
        with contextlib.suppress(SessionLostError, TimeoutError, ValueError):
            self.link.ask("up/close", close, {"kind": "closed", "session": self.session}, again_s=5.0, max_s=5.0)

    def draft(self, opened: Map) -> str:
        """Draft and commit until the request ends; return why."""
        text, policy, size = self.tokens, self.job["policy"], self.job["vocabulary"]["size"]
        ends, residual, epoch, self.fix = set(opened["end_tokens"]), policy["mode"] == "residual", 0, None
        while True:
            tokens, origins = list[int](), list[Map]()
            room = min(self.length, opened["max_draft"], opened["max_new_tokens"] - len(text))
            while len(tokens) < room and not ends & set(tokens[-1:]):
                token, counts = propose([*self.prompt, *text, *tokens], size, policy, len(text) + len(tokens))
                tokens, origins = [*tokens, token], [*origins, counts]
            less_one = [counts[token] - 1 for token, counts in zip(tokens, origins, strict=True)] if residual else None
            verdict = self.judge(opened, epoch, tokens, less_one)
            accepted, following, self.fix, tried = verdict["accepted"], verdict["next"], None, 0
            text += tokens[:accepted]
            if accepted < len(tokens):
                epoch += 1
                while residual:
                    self.fix = correct(following, origins[accepted], policy["seed"], len(text), tried)
                    if self.fix is not None:
                        following = self.fix
                        break
                    tried += len(following[2])
                    following = self.judge(opened, epoch, [], None, tried)["next"]
            text += [] if following is None else [following]
            if ends & set(text[-1:]):
                return "stop"
            if verdict["finish"] or len(text) >= opened["max_new_tokens"]:
                return "length"

    def judge(self, opened: Map, epoch: int, tokens: list[int], less_one: list[int] | None, *tried: int) -> Map:
        """Send a draft; return its verdict."""
        head = [opened["handle"], next(self.rounds), epoch, len(self.tokens), None if tried else self.fix]
        counts = None if less_one is None else pack(less_one)
        message = [*head, pack(tokens), counts, False, digest(self.tokens), *tried]
        wanted = {"kind": "verdict", "handle": head[0], "round": head[1]}  # a fault has both numbers, too
        return self.link.ask(f"up/draft/{opened['edge']}", message, wanted, again_s=10.0)


def main() -> None:
    """Run requests, each with the seed after the last one's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--prompt", type=int, nargs="+", default=[1])
    policy = {"mode": "residual", "temperature": 0.7, "top_k": 50, "top_p": 0.95, "seed": 1}
    others = {"host": "127.0.0.1", "port": 1883, "fleet": "fleet", "device": "device-9", "tokens": 40, "length": 4}
    for name, default in (others | policy | {"texts": 1}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    asked = vars(parser.parse_args())
    strings = json.loads(asked["vocabulary"].read_text(encoding="utf-8"))
    job = {"protocol": 1, "vocabulary": {"size": len(strings), "fingerprint": fingerprint(strings)}}
    job |= {"draft_model": "pairs", "quantization": "", "max_new_tokens": asked["tokens"]}
    link = ReferenceLink(asked["host"], asked["port"], asked["fleet"], asked["device"])
    for seed in range(asked["seed"], asked["seed"] + asked["texts"]):
        job["policy"] = {name: asked[name] for name in policy} | {"seed": seed}
        print(json.dumps(Text(link, job, asked["prompt"], asked["length"]).write()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        sys.exit(str(error))
