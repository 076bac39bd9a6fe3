"""What becomes of a run that is killed, stopped, starved of room, or fed damage and NaN.

Each command injects faults of one kind into runs of the tiny preset, started as users start them,
in a temporary directory.  It compares their end with that of a run that nothing disturbed, byte for
byte: `ledger.jsonl`, which has the numbers of the samples of each step, and the weights.

    kill      kill -9 of a run, again and again, also inside a save
    rank      kill -9 of one of four ranks, of torchrun alone
    stop      SIGTERM, SIGUSR1, SIGINT, to one process, to torchrun, to one of two ranks
    ranks     a run goes on with another number of ranks, with shared rows, with shared experts
    disk      a full disk, a directory that is read-only, and one that somebody deletes
    state     bits of a saved state flip, its files are cut
    numerics  NaN in a gradient, Inf in a picture
    headers   damaged headers of safetensors, configurations, indexes, tokenizers

Run `python -m benchmarks.faults` for all (20 minutes on two CPU cores, Linux only), or name some of
them; `--count 4` injects at most four faults of a kind.  Exit code 1: a promise was broken.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

from benchmarks.clock import print_table
from benchmarks.fuzz import damaged_headers
from convert import damage_of_state, newest_state, states_in, write_state
from train import SIGNALS

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a run that does not do what it should is killed
SAMPLES = 100
# Flags of a run.  Four ranks can share 4 rows; in 24 steps most samples are seen twice.
RUN = {"--start-from": "assets/tiny", "--stage": "mid", "--steps": 24, "--rows": 4,
       "--seq-length": 256, "--save-every": 4, "--log-every": 100, "--device": "cpu"}
Flags = dict[str, object]  # they replace those of RUN
MAY_MOUNT = "FAULTS_MAY_MOUNT"  # set in a process that may mount file systems
TABLE: list[list[object]] = []


# ------------------------------------------------------------------------------- runs and their end


class Process:
    """train.py on one process, or on `ranks` of them under torchrun."""

    def __init__(self, out: Path, flags: Flags | None = None, ranks: int = 0,
                 agent: tuple[str, ...] = (), prefix: tuple[str, ...] = (),
                 script: str | Path = "train.py", **environment: str) -> None:
        self.out = out
        self.output = out.with_name(f"{out.name}.txt")
        data = out.with_name("data.json")
        if not data.exists():
            write_data(data)
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
                         *agent]
        given = RUN | {"--data": data, "--out": out} | (flags or {})
        command = [*prefix, *launcher, script, "--deterministic", "--ledger",
                   *chain(*given.items())]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with open(self.output, "w") as output:
            self.popen = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=variables, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, what: Callable[[], object]) -> bool:
        """Wait until `what` holds; False if the process ends before."""
        end = time.monotonic() + PATIENCE
        while not what():
            if self.popen.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def train(self, steps: int = 0) -> bool:
        """Wait until it has trained so many steps; without a number, until it writes a state."""
        # before it says this, the ledger has lines of steps that will come again
        if not self.wait_for(lambda: " trained, " in self.said()):
            return False
        first = len(ledger(self.out))
        return self.wait_for(lambda: len(ledger(self.out)) >= first + steps if steps else
                             is_saving(self.out))

    def ranks(self) -> dict[int, int]:
        """The process id of each rank, a child of torchrun; none if it is one process."""
        found = {}
        for listed in Path(f"/proc/{self.popen.pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                variables = Path(f"/proc/{child}/environ").read_text()
                for rank_number in re.findall(r"\0RANK=(\d+)", variables):
                    found[int(rank_number)] = int(child)
        return found

    def kill(self) -> None:
        """Kill -9 all its processes.  Ranks have groups of their own."""
        for leader in (self.popen.pid, *self.ranks().values()):
            os.killpg(leader, signal.SIGKILL)
        self.popen.wait()

    def end(self, seconds: float = PATIENCE) -> int:
        """Its exit code; one that does not end by itself is killed, and has -9."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.popen.returncode


def write_data(file: Path) -> None:
    """SAMPLES records, half of them with a picture; an epoch is about twelve steps."""
    rng = random.Random(0)
    words = "a red blue small round box tree on under beside the table".split()
    records = []
    for number in range(SAMPLES):
        question, said = "What is there?", " ".join(rng.choices(words, k=rng.randint(5, 60)))
        record = {"id": f"record-{number}"}
        if number % 2:
            picture = Image.new("RGB", (56, 56), (rng.randrange(256), number, 128))
            picture.save(file.with_name(f"{number}.png"))
            record["images"] = [f"{number}.png"]
            question = "<image>" + question
        record["messages"] = [{"role": "user", "content": question},
                              {"role": "assistant", "content": said}]
        records.append(record)
    file.write_text(json.dumps(records))


def is_saving(out: Path) -> bool:
    """Is a state unfinished?"""
    return any(out.glob("*-state/*.partial"))


def ledger(out: Path) -> list[dict]:
    """The lines of a run's ledger that are complete."""
    file = out / "ledger.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def undisturbed(folder: Path, flags: Flags | None = None, ranks: int = 0) -> Path:
    """The directory of a run that nothing disturbs."""
    process = Process(folder / f"whole-{ranks}", flags, ranks)
    if process.end() != 0:
        raise RuntimeError(f"a run that nothing disturbs fails: {process.said()}")
    return process.out


def fault_of_end(process: Process, reference: Path) -> str:
    """How the end of a run differs from that of one that nothing disturbed; empty if nowhere."""
    out, seen = process.out, {}
    if process.end() != 0:
        return f"{out} does not go on to the end: {process.said()}"
    names = [{str(file.relative_to(run)) for file in run.rglob("*")} for run in (out, reference)]
    if names[0] != names[1]:
        return f"{out} and {reference} have other files: {sorted(names[0] ^ names[1])}"
    for name in sorted(names[0]):
        if name == "ledger.jsonl" or name.endswith("model.safetensors"):
            if (out / name).read_bytes() != (reference / name).read_bytes():
                return f"{out / name} differs from that of {reference}"

    # in an epoch each sample comes once: one has never been seen twice more often than another
    for line in ledger(out):
        counts = seen.setdefault(line["stage"], Counter(dict.fromkeys(range(SAMPLES), 0)))
        counts.update(line["numbers"])
        if len(counts) != SAMPLES or max(counts.values()) - min(counts.values()) > 1:
            return f"{out}: a sample is lost or comes twice, at step {line['step']}"
    return ""


def expect(holds: bool, sentence: str) -> int:
    """1, and the sentence is printed, if something is not as promised; else 0."""
    if not holds:
        print(f"FAILED: {sentence}", flush=True)
    return int(not holds)


def figure(injection: str, started: float, failures: int, text: str) -> int:
    """Print a figure, and keep it for the table; returns the number of failures."""
    if failures:
        text += f"; {failures} FAILURES"
    TABLE.append([injection, text, f"{time.monotonic() - started:.0f}"])
    print(f"{injection}: {text}", flush=True)
    return failures


# ----------------------------------------------------------------------------------- the injections


def kill(folder: Path, count: int = 20) -> int:
    """Kill -9 a run of three stages at random steps and inside saves; start it again and again."""
    flags = {"--stage": "all", "--steps": 12, "--save-every": 2}
    reference, out = undisturbed(folder, flags), folder / "killed"
    started, rng = time.monotonic(), random.Random(0)
    failures = inside = 0
    for number in range(count):
        process = Process(out, flags)
        if number == count - 1:  # while the checkpoint of a stage is written
            alive = process.wait_for(lambda: any(out.glob("*[0-9].partial")))
        elif number % 2:
            alive = process.train()
        else:
            alive = process.train(rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        inside += is_saving(out)
        failures += expect(alive, f"kill {number} came too late: {process.said()}")
        # behind the newest two there may be one that was being removed
        for state in chain(*(states_in(path)[-2:] for path in out.glob("*-state"))):
            failures += expect(damage_of_state(state) == "", damage_of_state(state))
    fault = fault_of_end(Process(out, flags), reference)
    failures += expect(not fault, fault) + expect(inside >= 0.4 * count or count < 5,
                                                     "few were inside a save")
    return figure("kill -9 of a run", started, failures, f"{count} kills, {inside} inside a save; "
                  "each time the same command goes on, end equal")


def is_alive(pid: int) -> bool:
    """Does a process run?  One that has ended is a zombie until torchrun asks for its code."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def rank(folder: Path, count: int = 3) -> int:
    """Kill one of four ranks: with --max-restarts the run goes on by itself, without it ends."""
    reference = undisturbed(folder, ranks=4)
    failures, rng = 0, random.Random(0)
    for restarts in ("3", "0")[:count]:
        started, victim = time.monotonic(), rng.randrange(4)
        process = Process(folder / restarts, ranks=4, agent=("--max-restarts", restarts))
        broken = expect(process.train(7), f"it ends too early: {process.said()}")
        pids = process.ranks()
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        process.wait_for(lambda ids=pids: not any(map(is_alive, ids.values())))
        gone = time.monotonic() - killed
        broken += expect(gone < 60, f"survivors of rank {victim} stay {gone:.0f} s")
        if restarts == "3":
            fault = fault_of_end(process, reference)
            text = "it restarts by itself, end equal"
        else:
            named = process.end(60) == 1 and re.search(rf"rank +: {victim}\b", process.said())
            fault = "" if named else f"rank {victim} is not named: {process.said()}"
            text = f"torchrun ends after {time.monotonic() - killed:.1f} s, names rank {victim}"
        broken += expect(not fault, fault)
        failures += figure(f"kill -9 of one rank of four, --max-restarts {restarts}", started,
                           broken, f"survivors gone after {gone:.1f} s; {text}")
    return failures + (without_torchrun(folder, reference) if count > 2 else 0)


def without_torchrun(folder: Path, reference: Path) -> int:
    """Kill torchrun alone: its ranks live on, here frozen, and must keep another run out."""
    started, process = time.monotonic(), Process(folder / "alone", ranks=4)
    failures = expect(process.train(7), f"it ends too early: {process.said()}")
    pids = process.ranks().values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(process.popen.pid, signal.SIGKILL)
    process.popen.wait()
    second = Process(process.out, ranks=4)
    failures += expect(second.end() == 1 and f"another run writes to {process.out}" in
                       second.said(), f"not refused: {second.said()}")
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    fault = fault_of_end(Process(process.out, ranks=4), reference)
    failures += expect(not fault, fault)
    return figure("kill -9 of torchrun, not of its ranks", started, failures, "another run in the "
                  "directory is refused while they live, then goes on, end equal")


def stop(folder: Path, count: int = 20) -> int:
    """Stop runs by signals, at steps and inside saves, on one process and on two ranks."""
    total, flags = 0, {"--steps": 48}
    for ranks, moments in ((0, count - count // 2), (2, count // 2)):
        reference, out = undisturbed(folder, flags, ranks), folder / f"stopped-{ranks}"
        started, rng, seconds = time.monotonic(), random.Random(ranks), [0.0]
        failures = inside = 0
        for number in range(moments):
            # torchrun passes SIGUSR1 on if it is told to
            process = Process(out, flags, ranks, ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
            alive = process.train(steps=0 if number % 3 == 2 else 1)
            time.sleep(0 if number % 3 == 2 else rng.uniform(0, 0.5))
            inside += is_saving(out)
            target = process.popen.pid
            if number % 2 and ranks:
                target = process.ranks()[rng.randrange(ranks)]
            sent = time.monotonic()
            # schedulers signal torchrun and its ranks: a rank may get the signal twice
            for pause in (0, rng.uniform(0, 1))[:1 + (number % 4 == 3)]:
                time.sleep(pause)
                with suppress(ProcessLookupError):
                    os.kill(target, SIGNALS[number // 2 % 3])
            code = process.end(60)
            seconds.append(time.monotonic() - sent)
            failures += expect(alive, f"signal {number} came too late") + stopped_badly(
                process, code, ranks, target)
        fault = fault_of_end(Process(out, flags, ranks), reference)
        failures += expect(not fault, fault)
        failures += expect(max(seconds) < 25, f"a signal took {max(seconds):.0f} s")
        total += figure(f"SIGTERM, SIGUSR1, SIGINT, ranks: {ranks or 1}", started, failures,
                        f"{moments} signals, {inside} inside a save; exit code 10 after at most "
                        f"{max(seconds):.1f} s, no step lost, end equal")
    return total


def stopped_badly(process: Process, code: int, ranks: int, target: int) -> int:
    """Number of promises that a run which got a signal has broken."""
    said, steps = process.said(), len(ledger(process.out))
    said_before, _, _ = said.partition("train.py: stopped and saved")
    failures = expect(said.count(f"stopped and saved after step {steps} of stage mid") == 1
                      and "Traceback" not in said_before, f"not stopped after {steps}: {said}")
    if not ranks:
        failures += expect(code == 10, f"exit code {code}: {said}")
    elif target != process.popen.pid:
        # torchrun's own exit code is 1; it prints those of the ranks
        failures += expect("exitcode  : 10" in said and code == 1, f"no exit code 10: {said}")
    state, damaged = newest_state(process.out / "mid-state")
    return failures + expect(not damaged and state.name == f"step-{steps:08}",
                             f"{steps} steps, but the newest state is {state}; {damaged}")


def ranks(folder: Path, count: int = 4) -> int:
    """Go on with other numbers of ranks and workers, with shared rows, with shared experts."""
    tiny = [(0, {"--workers": 0}), (2, {"--workers": 2}), (4, {"--workers": 1}),
            (2, {"--workers": 3, "--context-parallel": 2})]
    # few steps: with random experts, what two ranks round otherwise grows tenfold in three steps
    random_moe = {"--start-from": "", "--model": "tiny-moe", "--stage": "align", "--steps": 1}
    moe = {"--start-from": undisturbed(folder, random_moe) / "align", "--steps": 6}
    total, sharing = 0, moe | {"--expert-parallel": 2}
    for name, runs in (("1, 2, 4, 2 that share rows, 1", [*tiny[:count], (0, {})]),
                       ("2 that share experts, 1", [(2, sharing), (0, moe)])):
        place = folder / f"{len(runs)}-hops"
        place.mkdir()
        reference, started, failures = undisturbed(place, runs[-1][1]), time.monotonic(), 0
        for number, (rank_count, flags) in enumerate(runs):
            process = Process(place / "run", flags, rank_count)
            if number < len(runs) - 1:
                failures += expect(process.train(3), f"too early: {process.said()}")
                process.popen.terminate()
            code = process.end()
        failures += expect(code == 0, f"exit code {code}: {process.said()}")

        pairs = list(zip(ledger(process.out), ledger(reference), strict=True))
        for key in ("stage", "step", "numbers", "digest"):
            failures += expect(all(ours[key] == theirs[key] for ours, theirs in pairs),
                               f"{name}: {key} differs from that of one process")
        apart = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs)
        failures += expect(apart < 1e-5, f"{name}: losses are {apart:.1e} apart")
        total += figure(f"number of ranks: {name}", started, failures, f"{len(pairs)} steps of the "
                        f"same samples, losses {apart:.1e} apart")
    return total


def disk(folder: Path, count: int = 11) -> int:
    """Fill the disk during saves; take away leave to write, and the directory."""
    reference, out, prefix = undisturbed(folder), folder / "full", ()
    started, failures, sentences = time.monotonic(), 0, []
    out.mkdir()
    if MAY_MOUNT in os.environ:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "none", out], check=True)
    process = Process(out)
    process.train(9)
    process.popen.terminate()
    failures += expect(process.end() == 10, f"not stopped: {process.said()}")

    # pages that are left for the next save: for a line of the ledger, for state.json, for a part
    # of the tensors, for all but manifest.json; for a part of the last checkpoint; on two ranks
    state = states_in(out / "mid-state")[-1]
    pages = sum(-(-file.stat().st_size // 4096) for file in state.iterdir())
    rooms = [0, 1, 2, *(pages * tenth // 10 for tenth in (1, 3, 5, 7)), pages - 2, pages - 1]
    cases = [*((room, {}, 0) for room in rooms), (pages // 20, {"--save-every": 0}, 0),
             (pages // 2, {}, 2)]
    for room, flags, rank_count in cases[:count]:
        if MAY_MOUNT in os.environ:
            with open(out / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(out).free - 4096 * room)
        else:
            # no file may become longer: what is printed needs a page, and workers share memory by
            # files, too
            prefix = ("prlimit", f"--fsize={4096 * max(1, room)}")
            flags = {**flags, "--workers": 0}
        process = Process(out, flags, rank_count, prefix=prefix)
        failures += ended_badly(process, rank_count)
        sentences += re.findall("^train.py: .*", process.said(), re.M)
        (out / "ballast").unlink(missing_ok=True)
    fault = fault_of_end(Process(out), reference)
    failures += expect(not fault, fault)
    print(*sentences, sep="\n")
    figure("full disk", started, failures, f"{len(sentences)} times exit code 50, the states "
           "before stay whole; with room again end equal")
    return failures + out_of_reach(folder)


def ended_badly(process: Process, rank_count: int = 0) -> int:
    """Number of promises that a run which cannot write has broken, when it ends."""
    code, said = process.end(60), process.said()
    sentences = re.findall("^train.py: .*", said, re.M)
    if rank_count:
        good = code == 1 and "exitcode  : 50" in said
    else:
        # the sentence is the last word
        good = code == 50 and said.endswith(f"{''.join(sentences)}\n")
    failures = expect(good and len(sentences) == 1, f"exit code {code}: {said}")
    for state in states_in(process.out / "mid-state"):
        failures += expect(damage_of_state(state) == "", damage_of_state(state))
    return failures + expect(not is_saving(process.out), "an unfinished state is left")


def out_of_reach(folder: Path) -> int:
    """A directory that cannot be written, and one that is deleted while a run goes on."""
    started, failures, said = time.monotonic(), 0, []
    if MAY_MOUNT in os.environ:
        subprocess.run(["mount", "-o", "remount,ro", folder / "full"], check=True)
        process = Process(folder / "full")
        failures += ended_badly(process)
        said.append(process.said().splitlines()[-1])
        subprocess.run(["umount", folder / "full"], check=True)
    process = Process(folder / "deleted")
    process.train(5)
    shutil.rmtree(process.out)
    failures += ended_badly(process)
    print(*said, process.said().splitlines()[-1], sep="\n")
    return figure("directory read-only, deleted", started, failures, f"{len(said) + 1} times exit "
                  "code 50 and a sentence")


def damage(file: Path, rng: random.Random) -> str:
    """Flip a bit of a file or cut it; returns what was done."""
    content, place = bytearray(file.read_bytes()), rng.randrange(file.stat().st_size)
    if rng.random() < 0.5:
        file.write_bytes(content[:place])
        return f"{file} cut after {place} bytes"
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{file} with a flipped bit in byte {place}"


def state(folder: Path, count: int = 120) -> int:
    """Flip bits of saved states and cut their files; every sixth time it is the manifest."""
    started, rng, failures = time.monotonic(), random.Random(0), 0
    (folder / "states").mkdir()
    for step in (4, 8):
        write_state(folder / "states" / f"step-{step:08}", {"weight": torch.randn(64, 64)},
                    {"step": step, "ranks": 1}, None)
    for number in range(count):
        copy = shutil.copytree(folder / "states", folder / f"copy-{number}")
        newest = copy / "step-00000008"
        how = damage(rng.choice(sorted(newest.glob("s*" if number % 6 else "man*"))), rng)
        path, said = newest_state(copy)
        good = path == copy / "step-00000004" and len(said) == 1 and str(newest) in said[0]
        failures += expect(good, f"{how}: {path} is used, and said is {said}")
    figure("flips and cuts in states", started, failures, f"{count} refused by name, each time the "
           "state before is used")

    reference, started, broken = undisturbed(folder), time.monotonic(), 0
    process = Process(folder / "run")
    process.train(9)
    process.popen.terminate()
    process.end()
    for name in ("shard", "manifest"):
        out = shutil.copytree(process.out, folder / name)
        before, newest = states_in(out / "mid-state")
        how = damage(next(newest.glob(f"{name}*")), rng)
        again = Process(out)
        fault = fault_of_end(again, reference)
        told = re.search(f"{newest}.*it is not used\n(.*\n)*.* from {before}\n", again.said())
        broken += expect(not fault and told, f"{how}: {fault}: {again.said()}")
    return failures + figure("the same in two runs", started, broken, "said, goes on from the "
                             "state before, end equal")


# train.py with numbers that are not finite on rank 1, in the steps FAULT_STEPS
DRIVER = """
import math, os
import torch
import data, train

kind, faulty = os.environ["FAULT"], [*map(int, os.environ["FAULT_STEPS"].split())]
train_step, backward, normalize = train.train_step, train.backward, data.normalize_patches
now = 0

def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)

def is_hit(word):
    return kind == word and now in faulty and os.environ["RANK"] == "1"

def watched_step(state, step, ranks, stop=False):
    global now
    now = state.step + 1
    before = {name: local(x).clone() for name, x in state.tensors(ranks.rank).items()}
    train_step(state, step, ranks, stop)
    after = state.tensors(ranks.rank)
    same = all(torch.equal(local(after[name]), before[name]) for name in before)
    os.write(1, f"rank {ranks.rank} step {now} unchanged {same}\\n".encode())

def bad_backward(model, step, ranks):
    sums = backward(model, step, ranks)
    if is_hit("NaN in a gradient"):
        local(model.lm_head.weight.grad)[0, 0] = math.nan
    return sums

def bad_pixels(patches):
    patches = normalize(patches)
    if is_hit("Inf in a picture"):
        patches[0, 0] = math.inf
    return patches

train.train_step, train.backward, data.normalize_patches = watched_step, bad_backward, bad_pixels
train.main()
"""


def numerics(folder: Path, count: int = 4) -> int:
    """Numbers that are not finite on one of two ranks, in one step and in three in a row."""
    (folder / "driver.py").write_text(DRIVER)
    total, kinds = 0, ("NaN in a gradient", "Inf in a picture")
    for number, (kind, faulty, steps, code, text) in enumerate([
            *((kind, [5], 12, 0, "the run goes on") for kind in kinds),
            *((kind, [6, 7, 8], 8, 1, "the third ends it with exit code 40") for kind in kinds),
            ][:count]):
        started = time.monotonic()
        process = Process(folder / f"run-{number}", {"--steps": 12}, 2, FAULT=kind,
                          FAULT_STEPS=" ".join(map(str, faulty)), script=folder / "driver.py")
        ended, said, lines = process.end(), process.said(), ledger(process.out)
        failures = expect(ended == code and ("exitcode  : 40" in said) == code, said)
        failures += expect(len(lines) == steps, f"{len(lines)} steps: {said}")
        # numbers that are not finite are strings
        refused = [line for line in lines if isinstance(line["loss"], str)
                   or isinstance(line["norm"], str)]
        failures += expect([line["step"] for line in refused] == faulty, f"refused: {refused}")
        # on both ranks these steps change nothing, and the others change something
        seen = set(re.findall(r"rank (\d) step (\d+) unchanged (\w+)", said))
        wanted = {(rank_number, str(line["step"]), str(line in refused))
                  for line in lines for rank_number in "01"}
        failures += expect(seen == wanted, f"{kind}: {sorted(seen ^ wanted)}")
        logged = map(json.loads, open(process.out / "log.jsonl"))
        named = [{*entry["samples"]} for entry in logged if isinstance(entry.get("samples"), list)]
        numbers = [{f"record-{sample}" for sample in line["numbers"]} for line in refused]
        failures += expect(named == numbers, f"{kind}: named {named}, not {numbers}")
        total += figure(f"{kind} of one of two ranks, steps {faulty}", started, failures,
                        f"both refuse {len(refused)}, weights and moments unchanged, samples "
                        f"named; {text}")
    return total


def headers(folder: Path, count: int = 50_000) -> int:
    """Damaged checkpoints: see benchmarks/fuzz.py."""
    started = time.monotonic()
    torch.set_num_threads(1)  # tensors this small are faster so
    found = damaged_headers(count)
    text = (f"{found.refused:,} refused by name, {found.valid:,} read as valid; the slowest took "
            f"{found.seconds:.2f} s")
    return figure(f"{count:,} damaged headers, configurations, indexes and tokenizers", started,
                  len(found.failures), text)


COMMANDS: dict[str, Callable[..., int]] = {
    "kill": kill, "rank": rank, "stop": stop, "ranks": ranks, "disk": disk, "state": state,
    "numerics": numerics, "headers": headers}


def main() -> None:
    """Run the commands that are named, or all; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--count", type=int, help="injections of a command, at most")
    flags = parser.parse_args()
    names, failures = flags.commands or [*COMMANDS], 0
    if "disk" in names and MAY_MOUNT not in os.environ:
        # in a namespace of our own we may mount, and the mounts end with us
        enter = ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*enter, "true"], stderr=subprocess.DEVNULL).returncode == 0:
            os.environ[MAY_MOUNT] = "yes"
            os.execvp(enter[0], [*enter, sys.executable, "-m", __spec__.name, *sys.argv[1:]])
    for name in names:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            options = {"count": flags.count} if flags.count else {}
            failures += COMMANDS[name](Path(folder), **options)
    print()
    print_table(["injection", "figure", "seconds"], TABLE)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
