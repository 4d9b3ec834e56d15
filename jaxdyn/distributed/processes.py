"""Start-up of a run's many processes, one on each host or each GPU.

Everything they do together is `jax.distributed`'s. It ends a process by an abort that names nobody
when another one does not come; so a roll call is taken first, at the address where JAX's
coordinator is to listen, by which every process learns who is missing.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import time
from collections.abc import Sequence

import jax
from jax._src.clusters import ClusterEnv  # no public name tells who one is before one joins

from jaxdyn.types import JaxdynError

VARIABLE = "JAXDYN_DISTRIBUTED"
SECONDS = "JAXDYN_JOIN_SECONDS"
DEFAULT_SECONDS = 300.0
FORM = re.compile(r"(?P<address>[^,]+:(?P<port>\d+))(,(?P<processes>\d+),(?P<index>\d+))?")
"""HOST:PORT, and PROCESSES,INDEX or nothing."""
MARK = b"jaxdyn "
"""What every line of the roll call begins with: something else may listen there."""


class NotJoined(JaxdynError):
    """Not all processes of the run have found each other; they may, another time."""

    exit_code = 69
    """EX_UNAVAILABLE of sysexits.h."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Who this process is: number `index` of `processes`, the first at `address`, "host:port".

    `local_devices` are the accelerators of its host that are its own; None for all.
    """

    address: str
    processes: int
    index: int
    local_devices: Sequence[int] | None = None


def start_processes() -> int:
    """Join the processes of this run, as `JAXDYN_DISTRIBUTED` says; returns this one's index.

    The variable is unset or empty (the process is alone); `auto` (as Cloud TPU, SLURM, Open MPI
    or Kubernetes say); `HOST:PORT,PROCESSES,INDEX`; or `HOST:PORT`, with the rest as the cluster
    says. HOST is process 0's, PORT any that is free there. To be called before JAX is used.

    Raises:
      NotJoined: naming those that have not come within `JAXDYN_JOIN_SECONDS` (300).
      JaxdynError: for a variable of another form.
    """
    cluster = find_cluster()
    if cluster is None:
        return 0
    join(cluster)
    return cluster.index


def join(cluster: Cluster) -> None:
    """Meet the others; `NotJoined` if not all come."""
    seconds = join_seconds()
    take_roll_call(cluster, seconds)
    jax.distributed.initialize(
        cluster.address,
        cluster.processes,
        cluster.index,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(round(seconds), 30),
        shutdown_timeout_seconds=3600,  # the first may have files to write at the end
    )


def find_cluster() -> Cluster | None:
    """The cluster of which this process is a part, or None if it is alone.

    Raises:
      JaxdynError: if the variable has another form than `start_processes` says.
      NotJoined: if the cluster's own services do not answer.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if not asked:
        return None
    form = FORM.fullmatch(asked)
    if asked != "auto" and not (
        form
        and 0 < int(form["port"]) < 2**16
        and int(form["index"] or 0) < int(form["processes"] or 1)
    ):
        raise JaxdynError(
            f"{VARIABLE} must be auto, HOST:PORT or HOST:PORT,PROCESSES,INDEX with INDEX below "
            f"PROCESSES, got {asked!r}"
        )
    address = form["address"] if form else ""
    if form and form["processes"]:
        cluster: Cluster | None = Cluster(address, int(form["processes"]), int(form["index"]))
    else:
        cluster = detect(address)
    if cluster is None:
        print(
            f"jaxdyn: {VARIABLE}={asked}, but no cluster is found: it runs alone", file=sys.stderr
        )
    return None if cluster is None or cluster.processes == 1 else cluster


def detect(address: str) -> Cluster | None:
    """What the cluster's environment says; `address`, if given, is process 0's."""
    mpi = [os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK")]
    if address and all(mpi):
        size, rank, local = map(int, mpi)  # type: ignore[arg-type]
        return Cluster(address, size, rank, [local])
    seconds = max(round(join_seconds()), 1)
    try:
        found, processes, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            address or None, None, None, None, None, seconds
        )
    except Exception as error:  # of metadata servers and their clients
        raise NotJoined(f"{VARIABLE}: {type(error).__name__}: {error}") from error
    if found is not None and processes is not None and index is not None:
        return Cluster(found, processes, index, devices)
    if all(mpi) and int(mpi[0] or 1) > 1:
        raise JaxdynError(
            f"this Open MPI does not say where its process 0 is: set {VARIABLE}=HOST:PORT"
        )
    if address:
        raise JaxdynError(
            f"{VARIABLE}={address}, but no cluster says how many processes there are: add them "
            "and this one's index, HOST:PORT,PROCESSES,INDEX"
        )
    return None


def join_seconds() -> float:
    """How long a process waits for the others; JaxdynError if the variable is no such number."""
    text = os.environ.get(SECONDS, "").strip() or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise JaxdynError(f"{SECONDS} must be a number of seconds above 0, got {text!r}")
    return seconds


# -- the roll call --------------------------------------------------------------------------------


def take_roll_call(cluster: Cluster, seconds: float) -> None:
    """Return once every process of the cluster is there.

    Raises:
      NotJoined: on every process, naming those that are not there in time.
    """
    host, _, port = cluster.address.rpartition(":")
    if cluster.index == 0:
        problem = call(cluster, int(port), seconds)
    else:
        problem = answer(cluster, host.strip("[]"), int(port), seconds)
    if problem:
        raise NotJoined(problem)


def call(cluster: Cluster, port: int, seconds: float) -> str:
    """Process 0: hear the others, and tell them all what is wrong; "" if they are all there."""
    end = time.monotonic() + seconds
    missing = set(range(1, cluster.processes))
    problem = ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(listen(port, cluster))
        callers: dict[int, socket.socket] = {}
        while missing and not problem and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(1)  # one that connects and says nothing must not hold the rest up
                processes, index = heard(caller.recv(64))
            except (OSError, ValueError):
                continue
            if processes != cluster.processes or not 0 < index < processes:
                problem = (
                    f"process 0 was started as one of {cluster.processes}, and the process "
                    f"{index} as one of {processes}"
                )
            callers[index] = caller
            missing.discard(index)
        if missing and not problem:
            problem = (
                f"{named(missing)} of {cluster.processes} did not join process 0 at "
                f"{cluster.address} within {seconds:g} s"
            )
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(MARK + problem.encode() + b"\n")
    return problem


def listen(port: int, cluster: Cluster) -> socket.socket:
    """A socket on every interface, as JAX's coordinator will have it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=cluster.processes, dualstack_ipv6=dual
        )
    except OSError as error:
        raise NotJoined(
            f"process 0 cannot listen at {cluster.address}: {error.strerror or error}"
        ) from error


def heard(line: bytes) -> tuple[int, int]:
    """PROCESSES and INDEX of a caller; ValueError if it is somebody else."""
    if not line.startswith(MARK):
        raise ValueError("no call of a jaxdyn process")
    processes, index = map(int, line.removeprefix(MARK).split())
    return processes, index


def answer(cluster: Cluster, host: str, port: int, seconds: float) -> str:
    """Another process: tell process 0 that it is there; what that then says."""
    end = time.monotonic() + seconds
    reason = ""
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as line:
                line.settimeout(seconds + 10)  # process 0 may have begun to wait only now
                line.sendall(MARK + f"{cluster.processes} {cluster.index}\n".encode())
                said = line.makefile("rb").readline(4096)
            if said.startswith(MARK) and said.endswith(b"\n"):
                return said.removeprefix(MARK).decode().strip()
            reason = "something else listens there"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.2, left))
    return (
        f"process {cluster.index} of {cluster.processes} found no process 0 at {cluster.address} "
        f"within {seconds:g} s: {reason}"
    )


def named(missing: set[int], most: int = 8) -> str:
    """ "process 3", "processes 3, 5", or the first few."""
    first = ", ".join(map(str, sorted(missing)[:most]))
    more = f" and {len(missing) - most} more" if len(missing) > most else ""
    return f"process{'es' if len(missing) > 1 else ''} {first}{more}"
