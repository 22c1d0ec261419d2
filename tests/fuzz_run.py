"""Runs cases of damage in processes that may die, within a time and a room of memory, and says what came of them."""

import argparse
import collections
import contextlib
import logging
import multiprocessing
import resource
import signal
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import transformers

DOCUMENTED = (ValueError, OSError)
SECONDS = 10
"""Longest that a case may take; an intact load takes some hundredths."""
MULTIPLE, FREE = 40, 32 << 20
"""A load may take this many times the bytes of the folder, which Python's JSON needs, and what the libraries take."""
ROOM = 4 << 30
"""Address space of the process above what it has when it begins."""


class Hang(BaseException):
    """A case took too long; nothing that is tested may catch it."""


def limited(work):
    """What ``work`` gives within the time, or that it took longer."""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return work()
    except Hang:
        return "hang", traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _out_of_time(*_):
    raise Hang


def clear_peak():
    Path("/proc/self/clear_refs").write_text("5")


def resident(name="VmHWM"):
    """Bytes of this process: peak since :func:`clear_peak`, or another line of its status."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))


def quiet():
    """Nobody reads the progress bars and warnings of a hundred thousand loads."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


def work(make, case, seed, numbers, results):
    """Run cases in this process and send what comes of each, before and after."""
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        intact = make(Path(root, "intact"))
        top = resident("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (top, top))
        for number in numbers:
            results.send((number, None))
            results.send((number, case(intact, Path(root, "case"), seed, number)))
    results.send(None)


def run(make, case, seed, numbers):
    """Counts by damage and outcome, and findings, of cases in processes that may die.

    Args:
        make: gives what is intact, in a folder.
        case: runs one, see :func:`run_case`.
        seed: of all.
        numbers: of cases.
    """
    counts, findings = collections.Counter(), {}
    context = multiprocessing.get_context("spawn")
    while numbers:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(make, case, seed, numbers, theirs))
        process.start()
        theirs.close()
        last, ended = None, False
        with contextlib.suppress(EOFError):
            while (message := ours.recv()) is not None:
                last, result = message
                if result is not None:
                    counts[result[:2]] += 1
                    if result[2] is not None:
                        findings[last] = result
            ended = True
        process.join()
        if last is None:
            raise RuntimeError(f"no case began; exit code {process.exitcode}")
        if not ended:
            counts["?", "crash"] += 1
            findings[last] = ("?", "crash", f"the process ended with {process.exitcode}")
        numbers = [] if ended else [number for number in numbers if number > last]
    return counts, findings


def table(counts):
    """Lines of damage and outcome."""
    kinds = collections.defaultdict(collections.Counter)
    for (damage, outcome), count in counts.items():
        kinds[damage.split(" | ")[0]][outcome] += count
    for damage, outcomes in sorted(kinds.items()):
        yield f"{damage} ({outcomes.total()}): " + ", ".join(
            f"{o} {c}" for o, c in outcomes.most_common()
        )


def main(make, case, what):
    """Run cases of the command line and print what came of them; whether there are findings."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.cases) if given.only is None else [given.only]
    counts, findings = run(make, case, given.seed, list(numbers))
    print("\n".join(table(counts)))
    for number, (damage, outcome, wrong) in findings.items():
        print(f"\ncase {number} of seed {given.seed}: {damage}: {outcome}\n{wrong}")
    print(f"\n{counts.total()} cases, {len(findings)} findings")
    return bool(findings)
