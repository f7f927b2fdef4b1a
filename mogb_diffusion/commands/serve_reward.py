"""``mogb-diffusion serve-reward``."""

import argparse

from mogb_diffusion.commands._shared import positive, tell
from mogb_diffusion.errors import InputError

SUMMARY = "serve a reward over HTTP, for trainers elsewhere"
EXAMPLE = """
mogb-diffusion serve-reward geneval --option device=cuda --port 8600
mogb-diffusion serve-reward pickscore --host 0.0.0.0 --token-file token.txt
mogb-diffusion train tiny --set rewards.4.name=remote --set 'rewards.4.options={url: "http://127.0.0.1:8600"}'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which reward, where, and for whom."""
    parser.add_argument("reward", metavar="NAME", help="of a reward, or module:Class")
    parser.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], help="of the reward; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s; every other address needs a token")
    parser.add_argument("--port", type=int, default=8600, help="0 takes a free one; default: %(default)s")
    parser.add_argument(
        "--token-file", metavar="FILE", help="what clients must know; or the environment variable MOGB_REWARD_TOKEN"
    )
    parser.add_argument("--batch", metavar="N", type=positive, default=32, help="pictures at once; default: 32")
    parser.add_argument("--queue", metavar="N", type=positive, default=512, help="pictures that may wait; default: 512")
    parser.add_argument(
        "--timeout", metavar="S", type=positive, default=300, help="seconds for a request; default: 300"
    )


def run(options: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    import signal
    import threading

    from mogb_diffusion.config import parse_yaml
    from mogb_diffusion.rewards import load
    from mogb_diffusion.rewards._secrets import HIDDEN, hide, is_secret
    from mogb_diffusion.rewards.remote import find_token
    from mogb_diffusion.serving import RewardServer, Settings

    made = {}
    for assignment in options.option:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            shown = HIDDEN if is_secret(assignment) else assignment
            raise InputError(f"--option {shown}: must have the form KEY=VALUE.")
        try:
            made[key] = parse_yaml(value, f"--option {key}")
        except InputError as error:
            raise InputError(hide(str(error), {key: value})) from None
    token = find_token(None, options.token_file)
    settings = Settings(batch=options.batch, queue=options.queue, reward_timeout=float(options.timeout))
    server = RewardServer(
        load(options.reward, **made), options.reward, host=options.host, port=options.port, token=token,
        settings=settings,
    )  # fmt: skip
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with server:
        tell(f"{options.reward} at {server.url}" + (", with a token" if token else ", for this machine alone"))
        while not stop.wait(1.0):
            pass
        tell("stopping: the requests that are here are answered")
    counts = server.batcher.counts
    answers = ", ".join(f"{what}: {number}" for what, number in sorted(server.counts.items())) or "none"
    tell(f"{counts['pictures']} pictures in {counts['batches']} batches; answers: {answers}")
    return 0
