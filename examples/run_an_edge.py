"""Run an edge until Ctrl-C.

    python examples/run_an_edge.py [edge.toml]

Needs a broker, and the target model that the settings name.
"""

import sys

from fleet_edge import Edge, FleetError


def main(config: str | None = None) -> None:
    """Verify the drafts of the fleet's devices."""
    edge = Edge.from_config(config)

    def say() -> None:
        print(f"Edge {edge.settings.edge} verifies with {edge.target.name}; Ctrl-C ends it.", flush=True)

    edge.run(on_online=say)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FleetError as error:
        sys.exit(str(error))
