"""Catalogue of an edge's metrics: every name, what it means, and its labels.

Names follow those that vLLM and llama.cpp share, with a prefix of our own. No metric has a label for a device or a
session: those are in the session log.
"""

from typing import Final

from fleet_common.metrics import PREFIX, Metric, MetricKind


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.HISTOGRAM, meaning)


# Drafts

NUM_DRAFTS = _counter("spec_decode_num_drafts_total", "Verified drafts with at least one token.")
NUM_DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens_total", "Draft tokens of these drafts.")
NUM_TESTED = _counter("spec_decode_num_tested_tokens_total", "Draft tokens that were accepted or rejected.")
NUM_ACCEPTED = _counter("spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted.")
ACCEPTED_PER_POS = _counter(
    "spec_decode_num_accepted_tokens_per_pos_total", "Accepted draft tokens by position in the draft.", "position"
)

# Sessions

RUNNING = _gauge("num_requests_running", "Open sessions.")
WAITING = _gauge("num_requests_waiting", "Open sessions that wait for a step.")
SUCCESS = _counter("request_success_total", "Ended sessions, by reason.", "reason")
REFUSALS = _counter("refusals_total", "Refused Opens, by code.", "code")
FAULTS = _counter("faults_total", "Messages of devices that could not be served, by code.", "code")
DROPPED = _counter("dropped_messages_total", "Messages dropped because the inbox was full.")
DEVICES = _gauge("devices", "Devices known to this edge, by state of their connection.", "state")
DEVICES_ACTIVE = _gauge("devices_active", "Connected devices that sent a message within five minutes.")

# Tokens

PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens of new sessions.")
CACHED_TOKENS = _counter("cached_prompt_tokens_total", "Tokens of prompts and resumed sequences reused from the cache.")
PREFILL_TOKENS = _counter("prefill_tokens_total", "Tokens of prompts and resumed sequences computed.")
GENERATION_TOKENS = _counter("generation_tokens_total", "Committed tokens, drafted or edge-only.", "plan")

# Times

FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From the grant of a session to its first verified token.")
INTER_TOKEN = _histogram("inter_token_latency_seconds", "Mean time between tokens of two successive verdicts.")
QUEUE_TIME = _histogram("request_queue_time_seconds", "From a draft's arrival to its step, without prefill.")
STEP = _histogram("step_seconds", "Time of a forward pass and the verification of its drafts.")
BATCH_SESSIONS = _histogram("batch_sessions", "Sessions verified in a forward pass.")
BATCH_TOKENS = _histogram("batch_tokens", "New tokens in a forward pass.")
LINK_ROUND_TRIP = _histogram(
    "link_round_trip_seconds", "From publishing a verdict to the broker's acknowledgement, sampled once a second."
)

# Resources

KV_USAGE = _gauge("kv_cache_usage_ratio", "Share of KV memory used by open sessions.")
KV_RETAINED = _gauge("kv_cache_retained_ratio", "Share of KV memory kept from ended sessions, freed when needed.")
UPLINK_BYTES = _counter("uplink_bytes_total", "Payload bytes received from devices.")
DOWNLINK_BYTES = _counter("downlink_bytes_total", "Payload bytes sent to devices, by content.", "form")
LINK_EVENTS = _counter("link_events_total", "Events of the connection to the broker.", "event")
BROKER_UP = _gauge("broker_connected", "Whether the broker answers (1) or not (0).")
TARGET_UP = _gauge("target_available", "Whether the large model is available (1) or not (0).")
DRAINING = _gauge("draining", "Whether this edge is draining (1).")
STORE_RECORDS = _counter("store_records_total", "Records of the session log, by outcome.", "outcome")
STORE_QUEUE = _gauge("store_queue_records", "Records in memory waiting to be written.")
SPOOL_RECORDS = _gauge("store_spool_records", "Records spooled since the start.")
SPOOL_BYTES = _gauge("store_spool_bytes", "Size of the spool.")
STORE_LAG = _gauge("store_lag_seconds", "Time since the session log was last complete.")
INFO = _gauge("build_info", "Software of this edge; the value is always 1.", "version", "fleet", "edge", "target")

CATALOGUE: Final[tuple[Metric, ...]] = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
"""All metrics, in the order above."""
