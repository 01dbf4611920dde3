"""Kills the Load Manager that leads, and cuts its database connection, while real runs go on.

    python tests/standby_campaign.py --kills 50 --cuts 50 --seed 1

Two Load Managers on one real PostgreSQL, three real Locust clusters that always have a run of some seconds.
In turn the one that leads is killed with SIGKILL, its connection is ended by the database, or its way to the
database is cut for 6 s. Who ended is started again, as its supervisor would. Then it looks whether
- each create that was answered with 201 is one run, Finished on its duration;
- no process sent two stops for one run, and no load ran on after its run's end;
- nothing was commanded or written by one that had led before another led: each process has a role of the
  database and a way to Locust of its own, by which its writes and commands are told apart.
Prints take-over times and each broken promise; exit status 1 when there is one."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, LoadManager, create_body
from locust_process import LocustCluster, find_free_port
from postgres_process import PostgresServer
from target import Target
from tcp_proxy import TcpProxy
from waiting import eventually

import loadmanager

CLUSTERS = 3
USERS = 3
CUT_S = 6.0
AWAY = (OSError, HTTPException)
FINAL = ("Finished", "Failed")


class CommandProxy(TcpProxy):
    """Forwards to a Locust master, and notes when it was told to start or stop."""

    def __init__(self, target_port: int, note: Any) -> None:
        self._note = note
        super().__init__(target_port)

    def saw(self, received: bytes) -> None:
        for line in received.split(b"\r\n"):
            words = line.split(b" ")
            command = (
                words[1].partition(b"?")[0] if len(words) == 3 and words[2].startswith(b"HTTP/1") else b""
            )
            if command in (b"/swarm", b"/stop"):
                self._note(command.decode().strip("/"))


class Member(LoadManager):
    """One of the Load Managers: at the same address after each start, with a new role of the database."""

    def __init__(self, slot: int, campaign: Campaign) -> None:
        self.slot, self.campaign = slot, campaign
        self.folder = campaign.folder / f"member-{slot}"
        self.folder.mkdir()
        self.port = find_free_port()
        self.number = 0  # of this start among all starts
        self.database = TcpProxy(campaign.postgres.port)
        self.proxies: list[CommandProxy] = []
        super().__init__(self.folder, {})
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "loadmanager"]
        self.environment["PYTHONPATH"] = str(ROOT)

    def begin(self) -> None:
        """Start, and return once it leads or stands by."""
        self.number = self.campaign.next_number()
        self.proxies = [
            CommandProxy(int(locust.base_url.rpartition(":")[2]), self._note(index, self.number))
            for index, locust in enumerate(self.campaign.locusts)
        ]
        self.config = {
            "server": {"port": self.port},
            "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
            "orchestrator": {"metricsPollIntervalSeconds": 1},
            "storage": {"url": self.campaign.postgres.url(f"m{self.number}", self.database.port)},
            "standby": {"enabled": True, "advertisedUrl": self.url},
            "locustClusters": [
                {
                    "id": f"c{index}",
                    "baseUrl": f"http://127.0.0.1:{proxy.port}",
                    "tenantId": "t",
                    "envId": f"e{index}",
                }
                for index, proxy in enumerate(self.proxies)
            ],
        }
        self.start()

    def _note(self, cluster: int, number: int) -> Any:
        return lambda command: self.campaign.commands.append((time.monotonic(), number, cluster, command))

    def _listening(self, seen: int) -> str | None:
        return self.url if "standing by" in self.log()[seen:] else super()._listening(seen)

    def state(self) -> str:
        try:
            return self.request("GET", "/ready", token=None, timeout_s=2).json["status"]
        except AWAY:
            return "away"

    def close(self) -> None:
        self.end()
        for proxy in (self.database, *self.proxies):
            proxy.__exit__()


class Campaign:
    def __init__(self, seed: int, kills: int, cuts: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.faults = ["kill"] * kills + [("ended", "cut off")[number % 2] for number in range(cuts)]
        self.random.shuffle(self.faults)
        self.folder = folder
        self.commands: list[tuple[float, int, int, str]] = []  # when, whose, cluster, command
        self.took_over: dict[str, list[float]] = {"kill": [], "ended": [], "cut off": []}  # s
        self.broken: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}  # by id: cluster, duration; what became of it
        self.first_led: dict[int, float] = {}
        self.late_s: list[float] = []  # stops after their time
        self.stopped_again: list[float] = []  # s after the stop of the one that led before
        self._numbers = 0
        self._ending = threading.Event()

    # ---- the parts ----

    def next_number(self) -> int:
        self._numbers += 1
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE m{self._numbers} SUPERUSER LOGIN")
        return self._numbers

    def run(self) -> None:
        with PostgresServer() as self.postgres, Target() as target:
            self.locusts = [
                LocustCluster(ROOT / "locust" / "locustfile.py", workers=1, extra_args=["--host", target.url])
                for _ in range(CLUSTERS)
            ]
            try:
                for locust in self.locusts:
                    locust.start()
                self.members = [Member(slot, self) for slot in range(2)]
                self._run_with_members()
            finally:
                self._ending.set()
                for part in (*self.members, *self.locusts):
                    part.close() if isinstance(part, Member) else part.stop()

    def _run_with_members(self) -> None:
        for member in self.members:
            member.begin()
        self._watch_writes()
        users = [threading.Thread(target=self._use, args=(index,)) for index in range(CLUSTERS)]
        for user in users:
            user.start()
        try:
            for number, fault in enumerate(self.faults):
                time.sleep(self.random.uniform(0.5, 4.0))
                self._strike(number, fault)
        finally:
            self._ending.set()
            for user in users:
                user.join(90)
        self._look_at_runs()
        self._look_at_commands()
        self._look_at_writes()
        for index, locust in enumerate(self.locusts):
            if not _comes_to_rest(locust):
                self.broken.append(f"cluster c{index} still has users at the end")

    def _watch_writes(self) -> None:
        """Each statement that changes a table notes the role that sent it, in the same transaction."""
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE written (id BIGSERIAL, role TEXT)")
            connection.execute(
                "CREATE FUNCTION note_writer() RETURNS trigger LANGUAGE plpgsql AS "
                "'BEGIN INSERT INTO written (role) VALUES (session_user); RETURN NULL; END'"
            )
            for table in loadmanager.TABLES:
                connection.execute(
                    f"CREATE TRIGGER note_writer AFTER INSERT OR UPDATE OR DELETE ON {table} "
                    "FOR EACH STATEMENT EXECUTE FUNCTION note_writer()"
                )

    # ---- faults ----

    def _leader(self) -> Member | None:
        for member in self.members:
            if member.state() == "leading":
                self.first_led.setdefault(member.number, time.monotonic())
                return member
        return None

    def _strike(self, number: int, fault: str) -> None:
        leader = eventually(self._leader, 20, what="one of them leads")
        epoch, began = self._epoch(), time.monotonic()
        if fault == "kill":
            leader.kill9()
        elif fault == "ended":
            self._end_connection()
        else:
            leader.database.drop()
            leader.database.cut()
        eventually(
            lambda: self._epoch() != epoch and self._leader() and self._probe(),
            30, every_s=0.02, what=f"one of them leads after fault {number}, {fault}",
        )  # fmt: skip
        self.took_over[fault].append(time.monotonic() - began)
        if fault == "cut off":
            time.sleep(max(0.0, began + CUT_S - time.monotonic()))
            leader.database.forward()
        self._supervise(leader)
        times = self.took_over[fault]
        print(f"{number + 1}/{len(self.faults)} {fault}: {times[-1]:.2f} s", flush=True)

    def _supervise(self, former: Member) -> None:
        """Start again who ended: one that was cut off may also lead again, when it was the first to."""

        def settled() -> bool:
            assert former.process
            return former.process.poll() is not None or former.state() in ("leading", "standby")

        eventually(settled, 30, what="the former leader ended, or leads again")
        assert former.process
        status = former.process.poll()
        if status is None and self._leader() is former:
            return
        status = former.process.wait(20)
        if status not in (loadmanager.EXIT_LEAD_LOST, -9):
            self.broken.append(f"a former leader ended with status {status}: {former.log()[-500:]}")
        former.begin()

    def _epoch(self) -> str:
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = 'leader'").fetchone()
        return row[0].partition("/")[0] if row else ""

    def _end_connection(self) -> None:
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s",
                (loadmanager.PostgresDatabase.LOCK_ID,),
            )

    def _probe(self) -> bool:
        """Whether something that must be on disk is accepted again."""
        newest = next(reversed(self.runs), None)
        if newest is None:
            return True
        leader, note = self._leader(), {"text": "who leads?"}
        try:
            return bool(
                leader
                and leader.request("POST", f"/v1/tests/{newest}/annotations", note, timeout_s=3).status == 201
            )
        except AWAY:
            return False

    # ---- users ----

    def _ask(self, method: str, path: str, body: Any, headers: dict[str, str], until: float) -> Any:
        """The answer of whichever member gives one that is not 502 or 503; None when none does in time."""
        turn = 0
        while time.monotonic() < until:
            turn += 1
            member = self.members[turn % 2]
            try:
                answer = member.request(method, path, body, dict(headers), timeout_s=12)
                if answer.status not in (502, 503, 409):
                    return answer
            except AWAY:
                pass
            time.sleep(0.1)
        return None

    def _use(self, index: int) -> None:
        """One run after the other on a cluster, by way of any member, as a pipeline would."""
        chance = random.Random(f"{self.random.random()} {index}")
        try:
            while not self._ending.is_set():
                self._one_run(index, chance.randint(3, 9))
        except Exception as error:  # noqa: BLE001 - a user that ended unseen would test nothing
            self.broken.append(f"the user of c{index} ended: {error!r}")

    def _one_run(self, index: int, seconds: int) -> None:
        body = create_body(
            tenantId="t", envId=f"e{index}", targetUsers=USERS, spawnRate=USERS, durationSeconds=seconds
        )
        key = {"Idempotency-Key": str(uuid.uuid4())}
        answer = self._ask("POST", "/v1/tests", body, key, time.monotonic() + 60)
        if answer is None or answer.status != 201:
            self.broken.append(f"a create on c{index}: {answer and answer.body}")
            return
        run_id = answer.json["id"]
        self.runs[run_id] = {"cluster": index, "seconds": seconds}
        until = time.monotonic() + seconds + 40
        while time.monotonic() < until:
            answer = self._ask("GET", f"/v1/tests/{run_id}", None, {}, until)
            if answer is None or answer.status != 200:
                self.broken.append(f"run {run_id} cannot be read: {answer and answer.body}")
                return
            if answer.json["status"] in FINAL:
                return
            time.sleep(0.2)
        self.broken.append(f"run {run_id} of {seconds} s did not end")

    # ---- promises ----

    def _look_at_runs(self) -> None:
        for run_id, facts in self.runs.items():
            answer = self._ask("GET", f"/v1/tests/{run_id}", None, {}, time.monotonic() + 10)
            if answer is None or answer.status != 200:
                self.broken.append(f"run {run_id} is lost: {answer and answer.body}")
                continue
            run = facts["run"] = answer.json
            if run["status"] != "Finished" or run["stopReason"] != "duration":
                why = f"{run['status']}, {run['stopReason']}, {run.get('failureReason')}"
                self.broken.append(f"run {run_id} of c{facts['cluster']}: {why}")
                continue
            lasted_s = (run["finishedAtMs"] - run["startedAtMs"]) / 1000
            self.late_s.append(lasted_s - facts["seconds"])

    def _look_at_commands(self) -> None:
        led = sorted((moment, number) for number, moment in self.first_led.items())
        for when, number, cluster, command in self.commands:
            later = [other for moment, other in led if self.first_led.get(number, 0) < moment < when]
            if later:
                self.broken.append(f"{command} on c{cluster} by {number}, when {later} had led")
        for cluster in range(CLUSTERS):
            self._look_at_stops(cluster)

    def _look_at_stops(self, cluster: int) -> None:
        """A stop under way when its leader went may be sent again by the next one: those are counted."""
        stops: list[tuple[float, int]] = []
        for when, number, _, command in sorted(one for one in self.commands if one[2] == cluster):
            if command == "swarm":
                stops = []
                continue
            if any(other == number for _, other in stops):
                self.broken.append(f"two stops of one run on c{cluster} by {number}")
            elif stops:
                self.stopped_again.append(when - stops[-1][0])
            stops.append((when, number))

    def _look_at_writes(self) -> None:
        with psycopg.connect(self.postgres.url()) as connection:
            rows = connection.execute("SELECT role FROM written ORDER BY id").fetchall()
        self.writes = len(rows)
        seen: list[str] = []
        for (role,) in rows:
            if not seen or seen[-1] != role:
                if role in seen:
                    self.broken.append(f"{role} wrote after {seen[seen.index(role) + 1 :]}")
                seen.append(role)

    def print_result(self) -> None:
        for fault, times in self.took_over.items():
            if times:
                print(f"{fault}: {len(times)} times; accepts writes again after {_spread(times)}")
        counts = Counter(command for *_, command in self.commands)
        print(f"{len(self.runs)} runs; {counts['swarm']} starts and {counts['stop']} stops at Locust")
        if self.stopped_again:
            print(f"{len(self.stopped_again)} stops by the next one too, after {_spread(self.stopped_again)}")
        if self.late_s:
            print(f"ends after their time: {_spread(self.late_s)}")
        print(f"{self._numbers} processes; {self.writes} statements that changed a table")
        for line in self.broken:
            print(f"BROKEN {line}")
        print(f"{len(self.broken)} broken")


def _comes_to_rest(locust: LocustCluster) -> bool:
    """Whether no user is left, as soon as Locust says so: it keeps an answer for 2 s."""
    try:
        return eventually(lambda: locust.stats()["user_count"] == 0, 5)
    except AssertionError:
        return False


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"median {ordered[len(ordered) // 2]:.2f}, p95 {p95:.2f}, max {ordered[-1]:.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--cuts", type=int, help="of the database connection; default: as many as kills")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="standby-"))
    cuts = options.kills if options.cuts is None else options.cuts
    campaign = Campaign(options.seed, options.kills, cuts, folder)
    print(f"seed {options.seed}, {options.kills} kills, {cuts} cuts", flush=True)
    campaign.run()
    campaign.print_result()
    if campaign.broken:
        print(f"logs: {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
