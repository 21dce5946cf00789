"""The attacker: it runs command lines, kills what works for them, and has the outcome judged.

A round makes one dataset: a place, a layout, slots, and what is done to it, all chosen from the round's
seed. Kills come from mines, which lie where a process changes its storage, and from outside, while
somebody is at work. When a round's kills are used up its commands run to their end undisturbed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from tests.chaos import mines
from tests.chaos.judge import (
    BucketReader,
    FolderReader,
    Reader,
    Verdict,
    judge,
    judge_export,
    judge_scores,
)
from tests.chaos.mines import Mine
from tests.chaos.picture import pixels
from tests.faulty_proxy import FaultyProxy, Kind, Rain

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 600.0
"""Seconds that a command may take that nothing is done to, and that a storm may go on without a kill."""

SECRET = "of no use anywhere"
ACTORS = 4
LEASE = "1,5"
COMPLETE, WITH_FAILURES, USAGE, STOPPED = 0, 1, 2, 3
KILLED = -signal.SIGKILL

RAIN: dict[Kind, int] = {
    "slow-down": 3,
    "error": 2,
    "drop": 1,
    "cut-request": 1,
    "drop-answer": 1,
    "cut-answer": 2,
    "slow": 1,
    "forbidden": 1,
    "expired": 1,
}
RAIN_RATE = 0.01

COMMANDS = ("generate", "retry", "evaluate", "export", "repair")
COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "star", "cross")


class Unsound(AssertionError):
    """The package broke a promise, or a command ended as it must not."""


# --- a Ray that stands, and falls ----------------------------------------------------------------


class Standing:
    """A Ray that outlives the commands, and is started again when it was killed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._cluster: Cluster | None = None

    def __enter__(self) -> Standing:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def address(self) -> str:
        assert self._cluster is not None
        return self._cluster.address

    def restart(self) -> None:
        self._stop()
        self._start()

    def process(self, name: str) -> psutil.Process | None:
        assert self._cluster is not None
        kinds = self._cluster.head_node.all_processes.get(name)
        try:
            return psutil.Process(kinds[0].process.pid) if kinds else None
        except psutil.NoSuchProcess:
            return None

    def _start(self) -> None:
        before = dict(os.environ)
        os.environ.update(self._environment)
        config = {"gcs_rpc_server_reconnect_timeout_s": 5}
        try:
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": ACTORS,
                    "include_dashboard": False,
                    "include_log_monitor": False,
                    "_system_config": config,
                },
            )
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _stop(self) -> None:
        ray.shutdown()
        if self._cluster is not None:
            try:
                node = self._cluster.head_node
                node.kill_all_processes(check_alive=False, allow_graceful=False)
            finally:
                self._cluster = None


# --- what a round is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What a round does. Its own seed decides all of it."""

    seed: int
    place: str
    layout: str
    slots: int
    shard_size: int
    rows: int
    command: str
    kills: int
    form: str
    seeing: bool
    rain: bool

    @classmethod
    def of(
        cls, seed: int, place: str = "", kills: int = 0, command: str = "", engine: str = "fake"
    ) -> Choices:
        random = Random(seed)
        place = place or random.choice(["folder", "folder", "bucket"])
        fake = engine == "fake"
        return cls(
            seed=seed,
            place=place,
            layout=random.choice(["files", "webdataset", "parquet"]),
            slots=random.choice([1, 4]),
            shard_size=random.choice([1, 3, 5, 8]),
            rows=random.randint(40, 120) if fake else random.randint(12, 24),
            command=random.choice([command] if command else COMMANDS),
            kills=kills or random.randint(24, 48),
            form=random.choice(["hf", "parquet", "webdataset", "imagefolder"]),
            seeing=random.random() < 0.7,
            rain=place == "bucket" and random.random() < 0.7,
        )


@dataclass
class Figures:
    """Of a whole storm."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    datasets: int = 0
    given_up: int = 0
    unsound: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, verdict: Verdict) -> None:
        self.verdicts.update(verdict.counts)

    def __str__(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        v, kills = self.verdicts, self.kills.total()
        return (
            f"seed {self.seed}: {kills} kills {dict(self.kills.most_common())}, "
            f"{self.faults.total()} faults {dict(self.faults.most_common())}, "
            f"{self.datasets} datasets ({self.unsound} rounds unsound) {dict(self.commands)}, {v['rows']} rows, {v['lost']} lost, "
            f"{v['doubled']} doubled, {v['checksums']} checksums wrong, {v['strays']} strays, "
            f"{v['changed']} changed after commit, {self.given_up} given up for a while, "
            f"{v['parts']} hidden parts left, {minutes:.1f} min, {kills / minutes:.1f} kills/min"
        )


# --- what was committed stays --------------------------------------------------------------------


class Committed:
    """Looks at the objects of committed shards again and again; none may change or go."""

    def __init__(self, round: Round) -> None:
        self.round = round
        self.seen: dict[int, dict[str, Any]] = {}
        self.changed: list[str] = []
        self.looks = 0

    def look(self) -> None:
        versions = self.round.versions()
        for name in versions:
            table = re.fullmatch(r"metadata/(\d+)\.parquet", name)
            if table is not None and (shard := int(table.group(1))) not in self.seen:
                parts = self._parts(shard, name, versions)
                if parts is not None:
                    self.seen[shard] = parts
        for shard, parts in self.seen.items():
            for name, version in parts.items():
                now = versions.get(name)
                if now != version:
                    self.changed.append(
                        f"{name} of the committed shard {shard}: {version} -> {now}"
                    )
                    parts[name] = now
        self.looks += 1

    def _parts(self, shard: int, name: str, versions: dict[str, Any]) -> dict[str, Any] | None:
        try:
            table = pq.read_table(pa.BufferReader(self.round.reader.read(name)))
        except (OSError, pa.ArrowException):
            return None
        named = table["file_name"].drop_null().to_pylist()
        names = {n.partition("#")[0] for n in named} | {name, f"attention/{shard:05d}.parquet"}
        return {n: versions.get(n) for n in names}


# --- a round -------------------------------------------------------------------------------------


class Round:
    """One dataset, from nothing to a verdict."""

    def __init__(self, storm: Storm, choices: Choices) -> None:
        self.storm = storm
        self.choices = choices
        self.random = Random(choices.seed + 1)
        self.folder = storm.folder / f"round-{choices.seed}"
        self.folder.mkdir()
        self.mines = storm.mines
        self.kills = 0
        self.killed_at = 0.0
        self.wanted = 0
        self.log = (self.folder / "log").open("w")
        self.manifest = self._write_manifest()
        self.changed: list[str] = []
        self.laid: list[Path] = []
        self.left: subprocess.Popen | None = None
        """A command that has outlived an attack and is at work."""
        self._trace = 0
        if choices.place == "bucket":
            self.prefix = f"{self.folder.name}/out"
            self.output = f"s3://{storm.bucket}/{self.prefix}"
            self.reader: Reader = BucketReader(storm.client, storm.bucket, self.prefix)
        else:
            self.output = str(self.folder / "out")
            self.reader = FolderReader(self.folder / "out")

    def _write_manifest(self) -> Path:
        random, path = Random(self.choices.seed + 2), self.folder / "manifest.parquet"
        rows = []
        for i in range(self.choices.rows):
            one, other = random.sample(SHAPES, 2)
            prompt = f"a {random.choice(COLORS)} {one} and a {random.choice(COLORS)} {other}"
            subjects = [one, other][: random.randint(1, 2)]
            row = {"id": f"r{i:03}.{random.randint(0, 9)}", "prompt": prompt, "subjects": subjects}
            rows.append(row | {"seed": random.randint(0, 2**40), "note": {"number": i}})
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    # --- the whole of it

    def run(self) -> None:
        try:
            getattr(self, f"_{self.choices.command}")()
            if self.changed:  # told last, so that the rest of the round is seen, too
                self.fail("what was committed has changed", self.changed)
        finally:
            self.storm.figures.verdicts["changed"] += len(self.changed)
            self._sweep_mines()
            self.log.close()

    def _generate(self) -> None:
        self.make(self.choices.kills)
        self.judge()

    def _retry(self) -> None:
        """Rows that fail at first are made again under fire."""
        unlucky = self.mines / "unlucky"
        unlucky.touch()
        try:
            self.make(self.choices.kills // 3, retry=False)
        finally:
            unlucky.unlink()
        self.attack(self._generate_command("--retry-failed"), self.choices.kills * 2 // 3)
        self.finish()
        self.judge()

    def _evaluate(self) -> None:
        self.make(self.choices.kills // 2)
        command = ["evaluate", self.output, "--metric", "attention", "--batch-size", "2"]
        command += [*self._at(), *self._on_ray()]
        self.attack(command, self.choices.kills // 2)
        self.quietly(command)
        self.judge()
        self._hold("scores", judge_scores(self.reader, self.manifest, "attention"))

    def _export(self) -> None:
        self.make(self.choices.kills // 2)
        to = f"{self.output}-export" if self.choices.place == "bucket" else self.folder / "export"
        command = ["export", self.output, str(to), "--format", self.choices.form]
        command += ["--rows-per-file", "7", "--force", *self._at()]
        self.attack(command, self.choices.kills // 2)
        self.quietly(command)
        self.judge()
        there: Reader
        if self.choices.place == "bucket":
            there = BucketReader(self.storm.client, self.storm.bucket, f"{self.prefix}-export")
        else:
            there = FolderReader(Path(to))
        self._hold("export", judge_export(there, self.reader, self.choices.form))

    def _repair(self) -> None:
        """Damage is planted, found, repaired and made again, the last two under fire."""
        self.make(self.choices.kills // 3)
        planted = self._plant_damage()
        spoiled = judge(self.reader, self.manifest)
        if spoiled.sound:
            raise Unsound(f"the judge does not see the damage: {planted}")
        command = ["verify", self.output, "--manifest", str(self.manifest), "--repair"]
        command += [*self._at(), *(["--yes"] if self.storm.repair_asks else [])]
        self.attack(command, self.choices.kills // 3)
        self.quietly(command)
        self.make(self.choices.kills // 3, watched=False)
        self.judge()

    def _plant_damage(self) -> list[str]:
        """Into up to four shards, one object of each: where a table and one of its pictures are damaged,
        the picture's name cannot be told from one that someone else has taken, and is left."""
        by_shard: dict[str, list[str]] = {}
        for name in self.reader.names():
            if shard := re.match(r"(?:images|attention|metadata)/(\d+)", name):
                by_shard.setdefault(shard[1], []).append(name)
        shards = self.random.sample(sorted(by_shard), min(4, len(by_shard)))
        planted = []
        for name in [self.random.choice(by_shard[shard]) for shard in shards]:
            data = self.reader.read(name)
            kind = self.random.choice(["cut", "flip", "delete"])
            if kind == "delete":
                self.storm.remove(self, name)
            else:
                middle = len(data) // 2
                flipped = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
                self.storm.put(self, name, data[:middle] if kind == "cut" else flipped)
            planted.append(f"{kind} {name}")
        self.say(f"damage: {planted}")
        return planted

    # --- commands

    def _at(self) -> list[str]:
        return ["--s3-endpoint", self.storm.endpoint] if self.choices.place == "bucket" else []

    def _on_ray(self) -> list[str]:
        return ["--actors", str(ACTORS), "--ray-address", "RAY", "--max-deaths", "1000"]

    def _generate_command(self, *more: str) -> list[str]:
        c = self.choices
        return [
            *("generate", str(self.manifest), self.output, "--model", str(self.storm.model)),
            *("--layout", c.layout, "--slots", str(c.slots), "--shard-size", str(c.shard_size)),
            *("--device", "cpu", "--dtype", "float32", "--num-inference-steps", "4"),
            *(*self._on_ray(), *self._at(), *more),
        ]

    def make(self, kills: int, *, retry: bool = True, watched: bool = True) -> None:
        """Generate under fire, and to the end."""
        committed = Committed(self) if watched else None
        self.attack(self._generate_command(), kills, committed)
        code = self.quietly(self._generate_command(), committed)
        if committed is not None:
            self.changed += committed.changed
        if retry and code == WITH_FAILURES:
            self.finish()

    def finish(self) -> None:
        """Rows that were given up, since they were hit twice, are made in peace."""
        code = self.quietly(self._generate_command())
        if code == WITH_FAILURES:
            self.storm.figures.given_up += 1
            code = self.quietly(self._generate_command("--retry-failed"))
        if code != COMPLETE:
            self.fail("not complete", [f"exit code {code}"])

    def quietly(self, command: list[str], committed: Committed | None = None) -> int:
        """Run a command that nothing is done to. Right after a kill it may have to be run again: the
        lock may not be free yet, or Ray not whole."""
        self._sweep_mines()
        self.storm.clear_up()
        deadline = time.monotonic() + PATIENCE
        while True:
            was_shot_at = self.left is not None
            process, self.left = self.left or self.start(command), None
            while process.poll() is None:
                self._wait(process, 0.2)
                if committed is not None:
                    committed.look()
                if time.monotonic() > deadline:
                    process.kill()
                    self.fail("a command that nothing is done to hangs", command)
            code = process.returncode
            if code in (COMPLETE, WITH_FAILURES):
                return code
            said = self._said(process)
            if was_shot_at:  # what it has met may end it only now
                self._check(process)
                continue
            locked = code == USAGE and "Another run is writing" in said
            if time.monotonic() > deadline or not (locked or code == STOPPED):
                self.fail(f"exit code {code} of a command that nothing is done to", [said])
            time.sleep(0.5)

    def start(self, command: list[str]) -> subprocess.Popen:
        line = [self.storm.standing.address if word == "RAY" else word for word in command]
        environment = {**os.environ, **self.storm.environment}
        if self.choices.seeing:
            environment["AAE_CHAOS_SEEING"] = "1"
        said = self.folder / f"said-{self.storm.started}"
        self.storm.started += 1
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.drive", *line],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said.open("w"),
            stderr=subprocess.STDOUT,
        )
        process.said = said  # type: ignore[attr-defined]
        self.say(f"start {process.pid} {' '.join(line)}")
        return process

    def _said(self, process: Any) -> str:
        return process.said.read_text()

    def _wait(self, process: subprocess.Popen, seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        else:
            self.say(f"end {process.pid} {process.returncode}")

    # --- fire

    def attack(self, command: list[str], kills: int, committed: Committed | None = None) -> None:
        """Kill, and start again, until so many kills are done or the command is through."""
        self.kills, self.wanted = 0, kills
        if self.choices.rain:
            self.storm.let_it_rain(self.random)
        self.killed_at = time.monotonic()
        crowd: list[subprocess.Popen] = []
        try:
            while self.kills < self.wanted:
                several = 2 if self.random.random() < 0.1 else 1
                crowd = [self.start(command) for _ in range(several)]
                if several > 1:
                    self.storm.figures.faults["two at once"] += 1
                self._fire_at(crowd, command, committed)
                codes = [process.poll() for process in crowd]
                for process, code in zip(crowd, codes, strict=True):
                    if code is not None:
                        self._check(process)
                self.storm.raise_again()
                if any(code in (COMPLETE, WITH_FAILURES) for code in codes):
                    break
        finally:
            self.left = next((process for process in crowd if process.poll() is None), None)
            for process in crowd:
                if process is not self.left and process.poll() is None:
                    process.kill()
                    process.wait()
            self._sweep_mines()
            self.storm.clear_up()

    def _check(self, process: Any) -> None:
        """A command that was shot at may end in several ways, but not in any."""
        code, said = process.returncode, self._said(process)
        if code in (COMPLETE, WITH_FAILURES, KILLED):
            return
        if code == STOPPED and "Run the same command again" in said:
            return
        if code == USAGE and ("Another run is writing" in said or self.choices.place == "bucket"):
            return
        if self.storm.ray_was_killed:  # Ray ends the processes that it has lost
            return
        self.fail(f"exit code {code}", [said])

    def _fire_at(
        self,
        crowd: list[subprocess.Popen],
        command: list[str],
        committed: Committed | None,
    ) -> None:
        looked, external = 0.0, time.monotonic() + self.random.uniform(0, 3)
        while any(process.poll() is None for process in crowd):
            if time.monotonic() - self.killed_at > PATIENCE:
                self.fail("a storm gets nowhere", [f"{self.kills} of {self.wanted} kills"])
            self._collect()
            if self.kills >= self.wanted:
                self._sweep_mines()
            elif len(self.laid) < 3:
                self.laid.append(self._mine(command).lay(self.mines))
            alive = [process for process in crowd if process.poll() is None]
            if alive and self._somebody_works(command) and time.monotonic() > external:
                external = time.monotonic() + self.random.uniform(0.2, 3)
                if self.kills < self.wanted:
                    self._strike(self.random.choice(alive), crowd, command)
            if committed is not None and time.monotonic() - looked > 0.3:
                looked = time.monotonic()
                committed.look()
            if self.kills >= self.wanted:
                return  # what is still at work is let be until `attack` ends it
            for process in alive:
                self._wait(process, 0.03 / len(alive))

    def _mine(self, command: list[str]) -> Mine:
        who = "actor" if self._on_actors(command) and self.random.random() < 0.93 else "driver"
        places = {
            "generate": ["images", "attention", "metadata", "metadata", "rewriting"],
            "evaluate": ["metrics"],
        }.get(command[0], ["any"])
        if who == "driver":
            places = [*places, "any", "any"]
        when = self.random.choice(["before", "amid", "after", "after"])
        return Mine(who, when, "any", self.random.choice(places))

    def _strike(
        self, process: subprocess.Popen, crowd: list[subprocess.Popen], command: list[str]
    ) -> None:
        ways: dict[Callable[..., None], float] = {
            self._kill_actor: 6,
            self._kill_all_actors: 1,
            self._kill_driver: 0.5,
            self._pause: 0.7,
            self._overtake: 0.5 if self.choices.place == "bucket" else 0.1,
        }
        if command[0] in ("generate", "evaluate"):
            ways |= {self._kill_raylet: 0.25, self._kill_gcs: 0.1}
        way = self.random.choices(list(ways), list(ways.values()))[0]
        way(process, crowd, command)

    def _actors(self) -> list[psutil.Process]:
        raylet = self.storm.standing.process("raylet")
        try:
            children = raylet.children() if raylet else []
        except psutil.Error:
            return []
        return [p for p in children if re.search(r"ray::\w*Worker", _cmdline(p))]

    def _killed(self, what: str, times: int = 1) -> None:
        self.kills += times
        self.killed_at = time.monotonic()
        self.storm.figures.kills[what] += times
        self.say(f"killed {what} {times}")

    def _kill_actor(self, *_: Any) -> None:
        actors = self._actors()
        if actors and _kill(self.random.choice(actors).pid):
            self._killed("actor")

    def _kill_all_actors(self, *_: Any) -> None:
        if done := sum(_kill(actor.pid) for actor in self._actors()):
            self._killed("actor", done)

    def _kill_driver(self, process: subprocess.Popen, *_: Any) -> None:
        process.kill()
        process.wait()
        self._killed("driver")

    def _kill_raylet(self, *_: Any) -> None:
        self._kill_of_ray("raylet")

    def _kill_gcs(self, *_: Any) -> None:
        self._kill_of_ray("gcs_server")

    def _kill_of_ray(self, name: str) -> None:
        process = self.storm.standing.process(name)
        if process is None or self.storm.ray_was_killed:
            return
        process.kill()
        self.storm.ray_was_killed = True
        self._killed(name)

    def _pause(self, process: subprocess.Popen, *_: Any) -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.05, 1.0))
        process.send_signal(signal.SIGCONT)
        self.storm.figures.faults["paused"] += 1

    def _overtake(
        self, process: subprocess.Popen, crowd: list[subprocess.Popen], command: list[str]
    ) -> None:
        """The driver sleeps for longer than its lock lasts, and another comes."""
        process.send_signal(signal.SIGSTOP)
        self.say(f"asleep {process.pid}")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            other = self.start(command)
            crowd.append(other)
            before = self._trace
            while other.poll() is None and time.monotonic() < deadline:
                self._wait(other, 0.05)
                if f" {other.pid} driver" in self._news() or self._trace - before > 20_000:
                    break
            if other.poll() is None or other.returncode != USAGE:
                break  # it has the lock
            if self.choices.place == "folder":
                break  # it will never get it
            time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        self.storm.figures.faults["asleep"] += 1

    # --- mines and traces

    def _collect(self) -> None:
        """Count the mines that have gone off."""
        for path in self.laid[:]:
            if not path.exists():
                self.laid.remove(path)
                who = path.name.partition("~")[0]
                self._killed(who)
                self.say(f"mine {path.name}")

    def _sweep_mines(self) -> None:
        self._collect()
        for path in self.laid:
            path.unlink(missing_ok=True)
        self.laid = []

    def _news(self) -> str:
        with (self.mines / "trace").open() as trace:
            trace.seek(self._trace)
            text = trace.read()
            self._trace = trace.tell()
        return text

    def _somebody_works(self, command: list[str]) -> bool:
        """An actor does, or a driver whose command needs no actor."""
        return (" actor " if self._on_actors(command) else " driver ") in self._news()

    def _on_actors(self, command: list[str]) -> bool:
        return command[0] == "generate" or (command[0] == "evaluate" and self.choices.seeing)

    # --- the verdict

    def versions(self) -> dict[str, Any]:
        """Of each object, what changes when it is written again."""
        if self.choices.place == "bucket":
            return self.storm.versions(f"{self.prefix}/")
        found = {}
        for folder, _, files in os.walk(self.output):  # which minds no folder that goes meanwhile
            for path in (Path(folder, name) for name in files):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    name = path.relative_to(self.output).as_posix()
                    found[name] = (stat.st_mtime_ns, stat.st_ino)
        return found

    def judge(self) -> None:
        free = 1 if self.choices.slots > 1 else 0
        expect = (lambda prompt, seed: (pixels(prompt, seed), free)) if self.storm.fake else None
        verdict = judge(self.reader, self.manifest, expect)
        self.storm.figures.datasets += 1
        self._hold("dataset", verdict)
        if verdict.failed:
            self.fail("rows failed", [f"{verdict.failed}"])

    def _hold(self, what: str, verdict: Verdict) -> None:
        if what == "dataset":
            self.storm.figures.add(verdict)
        if not verdict.sound:
            self.fail(f"the judge on the {what}", verdict.problems)

    def say(self, text: str) -> None:
        self.log.write(f"{time.monotonic():.3f} {text}\n")
        self.log.flush()

    def fail(self, what: str, details: list[str]) -> None:
        self._sweep_mines()
        kept = "\n  ".join(str(one) for one in details[:12])
        self.say(f"FAILED {what}\n  {kept}")
        raise Unsound(
            f"{what}; kept in {self.folder}; make the same choices again with "
            f"AAE_BATCH_ROUND='{json.dumps(asdict(self.choices))}'\n  {kept}"
        )


def _cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# --- a storm -------------------------------------------------------------------------------------


class Storm:
    """Rounds, one after another, on one Ray and in one bucket.

    Args:
        server: URL of an S3.
        client: boto3's, that reaches it directly.
        model: what the command line is given as `--model`.
    """

    def __init__(
        self, folder: Path, server: str, client: Any, model: Path, seed: int, engine: str = "fake"
    ) -> None:
        self.folder = folder
        self.client = client
        self.model = model
        self.random = Random(seed)
        self.figures = Figures(seed)
        self.fake = engine == "fake"
        self.engine = engine
        self.mines = folder / "mines"
        mines.prepare(self.mines)
        self.bucket = f"storm-{seed}"
        client.create_bucket(Bucket=self.bucket)
        client.put_bucket_versioning(
            Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"}
        )
        self.proxy = FaultyProxy(server)
        self.endpoint = self.proxy.url
        self.started = 0
        self.ray_was_killed = False
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "AAE_BATCH_ENGINE": engine,
            mines.FOLDER: str(self.mines),
            mines.LEASE: LEASE,
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_MAX_ATTEMPTS": "5",
            "OMP_NUM_THREADS": "1",
            "RAY_ENABLE_METRICS_COLLECTION": "0",
        }
        self.standing = Standing(self.environment)
        said = subprocess.run(
            [sys.executable, "-m", "aae_batch.cli", "verify", "--help"],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        self.repair_asks = "--yes" in said.stdout

    @contextmanager
    def raging(self) -> Iterator[Storm]:
        with self.proxy, self.standing:
            yield self

    def until(self, kills: int, on_progress: Callable[[Figures], None]) -> Figures:
        """Rounds until so many kills are done, whatever comes of them.

        Args:
            on_progress: is given the figures after each round.

        Raises:
            Unsound: something was wrong in one of them, or in several.
        """
        wrong: list[str] = []
        while self.figures.kills.total() < kills:
            error = self._wrong_with(Choices.of(self.random.getrandbits(32), engine=self.engine))
            wrong += [str(error)] if error else []
            self.figures.unsound = len(wrong)
            on_progress(self.figures)
        if wrong:
            raise Unsound("\n".join(wrong))
        return self.figures

    def _wrong_with(self, choices: Choices) -> Unsound | None:
        try:
            self.round(choices)
        except Unsound as error:
            return error
        return None

    def round(self, choices: Choices) -> None:
        self.figures.commands[choices.command] += 1
        one = Round(self, choices)
        one.run()
        shutil.rmtree(one.folder)
        (self.mines / "trace").write_bytes(b"")

    # --- the weather

    def let_it_rain(self, random: Random) -> None:
        fell: Counter[Kind] = Counter()
        self.proxy.rain = Rain(random, RAIN_RATE, RAIN, fell)

    def clear_up(self) -> None:
        if self.proxy.rain is not None:
            self.figures.faults.update(self.proxy.rain.fell)
            self.proxy.rain = None
        self.raise_again()

    def raise_again(self) -> None:
        if self.ray_was_killed:
            self.standing.restart()
            self.ray_was_killed = False

    # --- the bucket, past the proxy

    def versions(self, prefix: str) -> dict[str, str]:
        pages = self.client.get_paginator("list_object_versions").paginate(
            Bucket=self.bucket, Prefix=prefix
        )
        return {
            item["Key"][len(prefix) :]: item["VersionId"]
            for page in pages
            for item in page.get("Versions", ())
            if item["IsLatest"]
        }

    def put(self, round: Round, name: str, data: bytes) -> None:
        if round.choices.place == "bucket":
            self.client.put_object(Bucket=self.bucket, Key=f"{round.prefix}/{name}", Body=data)
        else:
            Path(round.output, name).write_bytes(data)

    def remove(self, round: Round, name: str) -> None:
        if round.choices.place == "bucket":
            self.client.delete_object(Bucket=self.bucket, Key=f"{round.prefix}/{name}")
        else:
            Path(round.output, name).unlink()
