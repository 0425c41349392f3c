"""`fleet device chat` as a program, for tests on a real terminal: over a fleet in memory, then over a scripted agent.

The latter writes three words, and then nothing more until it is told to stop.
"""

import fcntl
import sys
import termios
import threading

from fleet_cli.device_chat import Conversation, StandardTerminal, colours_of, talk
from fleet_device.device import Device
from fleet_device.requests.chat import ChatHistory
from tests.support.memory_device import ScriptedAgent, TalkingDrafter, announce_edge, at_work, settings
from tests.support.memory_fleet import MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.scripted_talker import ScriptedTalker


def over_fleet() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet):
        device = Device(
            settings(draft_length=4, max_new_tokens=24),
            load=lambda _settings: TalkingDrafter(context=128),
            make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
        )
        with device:
            talk(device, system="", options={})


def held() -> None:
    talker = ScriptedTalker(ScriptedAgent(batches=[(1, 2, 3), (4,)], gate=threading.Semaphore(1)))
    Conversation(talker, StandardTerminal(), colours_of(sys.stdout), ChatHistory(), answer_tokens=24).run()
    talker.close()


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C on this terminal is this program's interrupt
    over_fleet()
    held()
