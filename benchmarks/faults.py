"""What becomes of a run that is killed, stopped, starved of room, or fed damage and NaN.

Each command injects faults of one kind into real runs of the tiny preset, started as users start
them, in a temporary directory, and compares their end with that of a run that nothing disturbed:
`ledger.jsonl` has a line for each step, with the numbers of its samples.

    kill      kill -9 of all processes, again and again, also inside a save
    rank      kill -9 of one of four ranks
    stop      SIGTERM, SIGUSR1, SIGINT, to one process, to torchrun, to one of two ranks
    ranks     a run goes on with another number of ranks, with shared rows, with shared experts
    disk      a full disk, a directory that is read-only or that somebody deletes
    state     bits of a saved state flip, its files are cut
    numerics  NaN in a gradient, Inf in a picture

Run `python -m benchmarks.faults` for all (20 to 30 minutes on two CPU cores, Linux), or name some;
`--count 4` injects at most four faults of a kind.  Exit code 1 says that a promise was broken.
"""

import argparse
import json
import math
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
from convert import damage_of_state, newest_state, states_in, write_state

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a run that does not do what it should is killed
STEPS = 24
# flags of a run; 4 rows a step, so that up to four ranks can share them
RUN = {"--start-from": "assets/tiny", "--stage": "mid", "--steps": STEPS, "--rows": 4,
       "--seq-length": 256, "--save-every": 4, "--log-every": 100, "--device": "cpu"}
Flags = dict[str, object]  # they replace those of RUN
MAY_MOUNT = "FAULTS_MAY_MOUNT"  # set in a process that may mount file systems
TABLE: list[list[object]] = []


# ------------------------------------------------------------------------------- runs and their end


class Process:
    """train.py on one process, or on `ranks` of them under torchrun, in a group of its own."""

    def __init__(self, out: Path, flags: Flags | None = None, ranks: int = 0,
                 agent: tuple[str, ...] = (), prefix: tuple[str, ...] = (),
                 script: str = "train.py", **environment: str) -> None:
        self.out = out
        self.output = out.with_name(f"{out.name}.txt")
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                         str(ranks), *agent]
        data = out.parent / "data.json"
        if not data.exists():
            write_data(data)
        given = RUN | {"--data": data, "--out": out} | (flags or {})
        command = [*prefix, *launcher, script, "--deterministic", "--ledger",
                   *chain(*given.items())]
        # each core of the machine has a rank of its own
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

    def wait_for_steps(self, count: int) -> bool:
        """Wait until it has trained `count` steps."""
        # when it says this, the ledger has lost the lines of steps that come again
        if not self.wait_for(lambda: " trained, " in self.said()):
            return False
        first = len(ledger(self.out))
        return self.wait_for(lambda: len(ledger(self.out)) >= first + count)

    def wait_for_save(self) -> bool:
        """Wait until it writes a state."""
        return (self.wait_for(lambda: " trained, " in self.said())
                and self.wait_for(lambda: is_saving(self.out)))

    def ranks(self) -> dict[int, int]:
        """The process id of each rank, a child of torchrun; of one process none."""
        found = {}
        for listed in Path(f"/proc/{self.popen.pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                variables = Path(f"/proc/{child}/environ").read_bytes().decode()
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
    """100 records, half of them with a picture; an epoch is about ten steps of four rows."""
    rng = random.Random(0)
    words = "a red blue small round box tree on under beside the table".split()
    records = []
    for number in range(100):
        said = " ".join(rng.choices(words, k=rng.randint(5, 60)))
        record = {"id": f"record-{number}", "messages": [
            {"role": "user", "content": "What is there?"}, {"role": "assistant", "content": said}]}
        if number % 2:
            picture = Image.new("RGB", (56, 56), (rng.randrange(256), number, 128))
            picture.save(file.with_name(f"{number}.png"))
            record["images"] = [f"{number}.png"]
            record["messages"][0]["content"] = "<image>What is there?"
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


def expect(holds: bool, sentence: str) -> int:
    """1, and the sentence is printed, if something is not as promised; else 0."""
    if not holds:
        print(f"FAILED: {sentence}", flush=True)
    return int(not holds)


def figure(injection: str, text: str, started: float) -> None:
    """Print a figure, and keep it for the table."""
    TABLE.append([injection, text, f"{time.monotonic() - started:.0f}"])
    print(f"{injection}: {text}", flush=True)


def undisturbed(folder: Path, name: str, flags: Flags | None = None, ranks: int = 0) -> Path:
    """The directory of a run that nothing disturbs."""
    process = Process(folder / name, flags, ranks)
    if process.end() != 0:
        raise RuntimeError(f"a run that nothing disturbs fails: {process.said()}")
    return process.out


def difference(out: Path, other: Path) -> str:
    """Where the end of a run differs from that of another, byte for byte; empty if nowhere."""
    names = [{str(file.relative_to(run)) for file in run.rglob("*")} for run in (out, other)]
    if names[0] != names[1]:
        return f"{out} and {other} have other files: {sorted(names[0] ^ names[1])}"
    for name in sorted(names[0]):
        if name == "ledger.jsonl" or name.endswith("model.safetensors"):
            if (out / name).read_bytes() != (other / name).read_bytes():
                return f"{out / name} differs from that of {other}"
    return ""


def unequal_epochs(out: Path) -> str:
    """Where samples are lost or come twice within an epoch; empty if nowhere."""
    # in each stage, at any time, a sample has been seen as often as another, or once more
    seen: dict[str, Counter[int]] = {}
    for line in ledger(out):
        counts = seen.setdefault(line["stage"], Counter(range(100)))
        counts.update(line["numbers"])
        if len(counts) != 100 or max(counts.values()) - min(counts.values()) > 1:
            return f"{out}: samples come twice in an epoch, at step {line['step']}"
    if any(max(counts.values()) < 3 for counts in seen.values()):
        return f"{out}: the run has not seen every sample once"
    return ""


# ----------------------------------------------------------------------------------- the injections


def kill(folder: Path, count: int = 20) -> int:
    """Kill -9 a run of three stages at random steps and inside saves; start it again and again."""
    flags = {"--stage": "all", "--steps": 12, "--save-every": 2}
    reference = undisturbed(folder, "whole", flags)
    started, rng = time.monotonic(), random.Random(0)
    failures = resumed = inside = 0
    out = folder / "killed"
    for number in range(count):
        process = Process(out, flags)
        if number % 2:
            alive = process.wait_for_save()
        else:
            alive = process.wait_for_steps(rng.randint(1, 4))
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        failures += expect(alive, f"kill {number} came too late: {process.said()}")
        inside += is_saving(out)
        for state in states_in(out / "mid-state")[-2:]:
            failures += expect(damage_of_state(state) == "", damage_of_state(state))
        resumed += number > 0 and alive
    # the last kill: while the checkpoint of a stage is written
    process = Process(out, flags)
    process.wait_for(lambda: any(out.glob("*[0-9].partial")))
    process.kill()

    process = Process(out, flags)
    failures += expect(process.end() == 0, f"a killed run does not end: {process.said()}")
    resumed += process.popen.returncode == 0
    for fault in (difference(out, reference), unequal_epochs(out)):
        failures += expect(not fault, fault)
    failures += expect(inside >= 0.4 * count, "too few kills were inside a save")
    figure("kill -9 of a run", f"{resumed}/{count} resumed, {inside} killed inside a save; ledger "
           "and weights equal" if not failures else f"{failures} failures", started)
    return failures


def rank(folder: Path, count: int = 2) -> int:
    """Kill one of four ranks: with --max-restarts the run goes on by itself, without it ends."""
    reference = undisturbed(folder, "whole", ranks=4)
    failures, rng = 0, random.Random(0)
    for restarts in (3, 0)[:count]:
        started, victim = time.monotonic(), rng.randrange(4)
        process = Process(folder / f"restarts-{restarts}", ranks=4,
                          agent=("--max-restarts", str(restarts)))
        alive = process.wait_for_steps(7)
        pids = process.ranks()
        os.kill(pids.pop(victim), signal.SIGKILL)
        killed = time.monotonic()
        # a rank that has ended is a zombie until torchrun asks for its exit code
        process.wait_for(lambda ids=pids: not any(is_alive(pid) for pid in ids.values()))
        gone = time.monotonic() - killed
        code = process.end()
        ended, said = time.monotonic() - killed, process.said()
        failures += expect(alive and gone < 60, f"survivors of rank {victim} stay {gone:.0f} s")
        if restarts:
            fault = difference(process.out, reference) or unequal_epochs(process.out)
            failures += expect(code == 0 and not fault, f"exit code {code}, {fault}: {said}")
            figure("kill -9 of one rank of four, --max-restarts 3", f"survivors gone after "
                   f"{gone:.1f} s, restarted by itself, exit code {code}, ledger and weights "
                   f"{'differ' if fault else 'equal'}", started)
        else:
            named = re.search(rf"rank\s*:\s*{victim}\b", said) is not None
            failures += expect(code != 0 and ended < 60 and named, f"exit code {code}: {said}")
            figure("the same without", f"torchrun ends after {ended:.1f} s with {code}, rank "
                   f"{victim} {'is' if named else 'is not'} named", started)
    return failures


def is_alive(pid: int) -> bool:
    """Does a process exist and run?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop(folder: Path, count: int = 20) -> int:
    """Stop runs by signals, at steps and inside saves, on one process and on two ranks."""
    failures, flags = 0, {"--steps": 48}
    for ranks, moments in ((0, count - count // 2), (2, count // 2)):
        reference = undisturbed(folder, f"whole-{ranks}", flags, ranks)
        started, rng = time.monotonic(), random.Random(ranks)
        out, seconds, inside = folder / f"stopped-{ranks}", [], 0
        for number in range(moments):
            # torchrun does not pass SIGUSR1 on unless it is told to
            process = Process(out, flags, ranks, agent=(
                "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
            if number % 3 == 2:
                alive = process.wait_for_save()
            else:
                alive = process.wait_for_steps(1)
                time.sleep(rng.uniform(0, 0.5))
            saving, target = is_saving(out), process.popen.pid
            if not alive:
                failures += expect(False, f"signal {number} came too late: {process.said()}")
                break
            if number % 2 and ranks:
                target = process.ranks()[rng.randrange(ranks)]
            sent = time.monotonic()
            os.kill(target, SIGNALS[number % 3])
            if number % 4 == 3:  # as schedulers do that signal torchrun and the ranks
                time.sleep(rng.uniform(0, 1))
                with suppress(ProcessLookupError):
                    os.kill(target, SIGNALS[number % 3])
            code = process.end(60)
            seconds.append(time.monotonic() - sent)
            inside += saving
            failures += stopped_badly(process, code, ranks, target)
        process = Process(out, flags, ranks)
        failures += expect(process.end() == 0, f"does not go on to the end: {process.said()}")
        for fault in (difference(out, reference), unequal_epochs(out)):
            failures += expect(not fault, fault)
        failures += expect(max(seconds) < 25, f"a signal took {max(seconds):.0f} s")
        figure(f"SIGTERM, SIGUSR1, SIGINT, {ranks or 1} ranks", f"{moments} signals, {inside} "
               f"inside a save: {failures} failures, at most {max(seconds):.1f} s to the exit",
               started)
    return failures


def stopped_badly(process: Process, code: int, ranks: int, target: int) -> int:
    """Number of promises that a run which got a signal has broken."""
    said, lines = process.said(), ledger(process.out)
    sentence = f"stopped and saved after step {len(lines)} of stage mid"
    failures = expect(said.count(sentence) == 1, f"not said: {sentence!r}, but {said}")
    if not ranks:
        failures += expect(code == 10, f"exit code {code}: {said}")
    elif target != process.popen.pid:
        # torchrun's own exit code is 1; it prints those of the ranks
        failures += expect("exitcode  : 10" in said and code, f"no exit code 10: {said}")
    state, damaged = newest_state(process.out / "mid-state")
    failures += expect(not damaged and state.name == f"step-{len(lines):08}",
                       f"{len(lines)} steps, but the newest state is {state}; {damaged}")
    return failures + expect("Traceback" not in said.partition("train.py: stopped")[0],
                             f"a traceback: {said}")


def ranks(folder: Path, count: int = 4) -> int:
    """Go on with other numbers of ranks and workers, with shared rows, with shared experts."""
    tiny = [(0, {"--workers": 0}), (2, {"--workers": 2}), (4, {"--workers": 1}),
            (2, {"--workers": 3, "--context-parallel": 2}), (0, {})]
    moe = {"--start-from": "", "--model": "tiny-moe", "--steps": 8}
    hops = {"1, 2, 4 ranks, 2 that share rows, 1": [*tiny[:count], tiny[-1]],
            "tiny-moe, 2 ranks that share experts, 1": [
                (2, moe | {"--expert-parallel": 2}), (0, moe)]}
    failures = 0
    for name, runs in hops.items():
        reference = undisturbed(folder, f"whole-{len(runs)}", runs[-1][1])
        started, out = time.monotonic(), folder / f"hops-{len(runs)}"
        for number, (rank_count, flags) in enumerate(runs):
            process = Process(out, flags, rank_count)
            if number < len(runs) - 1:
                failures += expect(process.wait_for_steps(3), f"too early: {process.said()}")
                process.popen.terminate()
            code = process.end()
        failures += expect(code == 0, f"exit code {code}: {process.said()}")

        pairs = list(zip(ledger(out), ledger(reference), strict=True))
        for key in ("stage", "step", "numbers", "digest"):
            failures += expect(all(ours[key] == theirs[key] for ours, theirs in pairs),
                               f"{name}: {key} differs from that of one process")
        apart = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs)
        failures += expect(apart < 1e-5, f"{name}: losses are {apart:.1e} apart")
        failures += expect(not unequal_epochs(out) or "moe" in name, unequal_epochs(out))
        figure(name, f"{len(pairs)} steps of the same samples: {failures} failures, losses at most "
               f"{apart:.1e} apart", started)
    return failures


def disk(folder: Path, count: int = 11) -> int:
    """Fill the disk during saves; take away leave to write, and the directory."""
    reference = undisturbed(folder, "whole")
    failures, started, out, prefix = 0, time.monotonic(), folder / "full", ()
    out.mkdir()
    if MAY_MOUNT in os.environ:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "none", out], check=True)
    process = Process(out)
    process.wait_for_steps(9)
    process.popen.terminate()
    failures += expect(process.end() == 10, f"not stopped: {process.said()}")
    state = states_in(out / "mid-state")[-1]
    pages = sum(-(-file.stat().st_size // 4096) for file in state.iterdir())
    # pages that are left for the next save: for a line, for state.json, for a part of the tensors,
    # for all but manifest.json; then for a part of the last checkpoint; and on two ranks
    rooms = [0, 1, 2, *(pages * tenth // 10 for tenth in (1, 3, 5, 7)), pages - 2, pages - 1]
    cases = [*((room, {}, 0) for room in rooms), (pages // 20, {"--save-every": 0}, 0),
             (pages // 2, {}, 2)]
    sentences = []
    for room, flags, ranks_of_run in cases[:count]:
        if MAY_MOUNT in os.environ:
            with open(out / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4096 * (free_pages(out) - room))
        else:
            prefix = ("prlimit", f"--fsize={4096 * room}")
        process = Process(out, flags, ranks_of_run, prefix=prefix)
        code = process.end(60)
        (out / "ballast").unlink(missing_ok=True)
        failures += ended_badly(process, code, ranks_of_run)
        sentences += re.findall("^train.py: .*", process.said(), re.M)
    for sentence in sentences:
        print(f"    {sentence}")
    process = Process(out)
    fault = f"does not go on: {process.said()}" if process.end() else difference(out, reference)
    failures += expect(not fault, fault)
    kinds = {re.sub(".*/", "", sentence) for sentence in sentences}
    figure("full disk", f"{len(sentences)} times, {len(kinds)} different sentences: {failures} "
           "failures", started)
    return failures + out_of_reach(folder)


def free_pages(path: Path) -> int:
    """Pages of 4,096 bytes that are free on a file system."""
    return shutil.disk_usage(path).free // 4096


def ended_badly(process: Process, code: int, ranks_of_run: int = 0) -> int:
    """Number of promises that a run which could not write has broken."""
    said = process.said()
    sentences = [line for line in said.splitlines() if line.startswith("train.py: ")]
    failures = expect(len(sentences) == 1, f"not one sentence: {said}")
    if ranks_of_run:
        failures += expect("exitcode  : 50" in said and code == 1, f"exit code {code}: {said}")
    else:
        # a line that follows belongs to no sentence
        alone = said.rstrip().splitlines()[-1:] == sentences
        failures += expect(code == 50 and alone, f"exit code {code}: {said}")
    for state in states_in(process.out / "mid-state"):
        failures += expect(damage_of_state(state) == "", damage_of_state(state))
    return failures + expect(not is_saving(process.out), "an unfinished state is left")


def out_of_reach(folder: Path) -> int:
    """A directory that cannot be written, and a directory that is deleted, while a run goes on."""
    started, failures, said = time.monotonic(), 0, []
    if MAY_MOUNT in os.environ:
        out = folder / "full"
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        process = Process(out)
        failures += ended_badly(process, process.end(60))
        said.append(process.said().splitlines()[-1])
        subprocess.run(["umount", out], check=True)
    process = Process(folder / "deleted")
    process.wait_for_steps(5)
    shutil.rmtree(process.out)
    failures += ended_badly(process, process.end(60))
    said.append(process.said().splitlines()[-1])
    figure("read-only directory, deleted directory", f"{failures} failures; {'; '.join(said)}",
           started)
    return failures


def state(folder: Path, count: int = 120) -> int:
    """Flip bits of saved states and cut their files; every sixth time it is the manifest."""
    started, rng, failures, refused = time.monotonic(), random.Random(0), 0, 0
    (folder / "states").mkdir()
    for step in (4, 8):
        write_state(folder / "states" / f"step-{step:08}", {"weight": torch.randn(64, 64)},
                    {"step": step, "ranks": 1}, None)
    for number in range(count):
        copy = folder / f"copy-{number}"
        shutil.copytree(folder / "states", copy)
        newest = copy / "step-00000008"
        files = sorted(newest.glob("*s*" if number % 6 else "manifest.json"))
        how = damage(rng.choice(files), rng)
        path, said = newest_state(copy)
        good = path == copy / "step-00000004" and len(said) == 1 and str(newest) in said[0]
        refused += good
        failures += expect(good, f"{how}: {path} is used, and said is {said}")
    figure("flips and cuts in states", f"{refused}/{count} refused by name, the state before is "
           "used", started)

    reference, started = undisturbed(folder, "whole"), time.monotonic()
    process = Process(folder / "run")
    process.wait_for_steps(9)
    process.popen.terminate()
    process.end()
    for name in ("shard*", "manifest.json"):
        out = shutil.copytree(process.out, folder / f"run-{name.strip('*')}")
        before, newest = states_in(out / "mid-state")
        how = damage(next(newest.glob(name)), rng)
        again = Process(out)
        fault = "" if again.end() == 0 else "it fails"
        said = again.said()
        for sentence in (f"{newest}", "it is not used", f"from {before}"):
            if sentence not in said:
                fault = f"not said: {sentence}"
        fault = fault or difference(out, reference)
        failures += expect(not fault, f"{how}: {fault}: {said}")
    figure("the same in two runs", f"{failures} failures", started)
    return failures


def damage(file: Path, rng: random.Random) -> str:
    """Flip a bit of a file or cut it; returns what was done."""
    content, place = bytearray(file.read_bytes()), rng.randrange(file.stat().st_size)
    if rng.random() < 0.5:
        file.write_bytes(content[:place])
        return f"{file} cut after {place} bytes"
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{file} with a flipped bit in byte {place}"


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
    total = 0
    faults = [(kind, steps) for steps in ("5", "6 7 8")
              for kind in ("NaN in a gradient", "Inf in a picture")]
    for number, (kind, steps) in enumerate(faults[:count]):
        started, faulty = time.monotonic(), [*map(int, steps.split())]
        process = Process(folder / f"run-{number}", {"--steps": 12}, ranks=2, FAULT=kind,
                          FAULT_STEPS=steps, script=str(folder / "driver.py"))
        code, said, lines = process.end(), process.said(), ledger(process.out)
        three = len(faulty) == 3
        failures = expect(code == three and ("exitcode  : 40" in said) == three, said)
        failures += expect(len(lines) == (8 if three else 12), f"{len(lines)} steps: {said}")
        refused = [line["step"] for line in lines
                   if not math.isfinite(line["loss"]) or not math.isfinite(line["norm"])]
        failures += expect(refused == faulty, f"{kind}: refused {refused}, not {faulty}")
        # on both ranks these steps change nothing, and others change something
        seen = set(re.findall(r"rank (\d) step (\d+) unchanged (\w+)", said))
        wanted = {(rank_number, str(line["step"]), str(line["step"] in faulty))
                  for line in lines for rank_number in "01"}
        failures += expect(seen == wanted, f"{kind}: {sorted(seen ^ wanted)}")
        logged = [json.loads(line) for line in open(process.out / "log.jsonl")]
        named = [{*entry["samples"]} for entry in logged if isinstance(entry.get("samples"), list)]
        numbers = [{f"record-{number}" for number in line["numbers"]} for line in lines
                   if line["step"] in faulty]
        failures += expect(named == numbers, f"{kind}: named {named}, not {numbers}")
        figure(f"{kind}, on one of two ranks, steps {steps}", f"{failures} failures: both refuse "
               f"{len(refused)}, samples named, exit code {40 if three else 0}", started)
        total += failures
    return total


COMMANDS: dict[str, Callable[..., int]] = {
    "kill": kill, "rank": rank, "stop": stop, "ranks": ranks, "disk": disk, "state": state,
    "numerics": numerics}


def main() -> None:
    """Run the commands that are named, or all; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--count", type=int, help="injections of a kind, at most")
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
