"""Judge the facts of all nodes: for each check what was found, what is wrong, and what to do. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.console.progress import format_bytes
from zero_sft.printable import first_of, with_count

Facts = Sequence[Mapping[str, Any]]
"""The facts of each node; see `node_facts.collect`. `run` adds "time", "sees_output", "devices" and "ranks"."""

MOST_SECONDS_APART = 10.0
LEAST_OPEN_FILES = 1024

_REMEDY = "correct what the message says"

UNSEEN_GPUS_REMEDY = (
    "install a torch for the nodes' CUDA release, not one for CPUs (+cpu), and see what nvidia-smi says there; to train on the "
    "CPUs, export DS_ACCELERATOR=cpu"
)
LEAST_SHARED_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check.

    Attributes:
        found: what was found, in a few words.
        problem: what is wrong, with the nodes; "" for nothing.
        remedy: what to do then.
        is_fatal: whether a run would fail; else it may go on.
    """

    name: str
    found: str = ""
    problem: str = ""
    remedy: str = ""
    is_fatal: bool = True

    @property
    def state(self) -> str:
        """Return ok, WARNING or FAILED."""
        return "ok" if not self.problem else "FAILED" if self.is_fatal else "WARNING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Memory and disk that a run needs.

    Attributes:
        host_bytes: on each node; None if it can't be estimated.
        reason: why not.
        output_bytes: at least, for one checkpoint and the export; None if not known.
        on_each_node: whether each node keeps a separate output folder.
        problem: what is wrong with the model or the DeepSpeed config; "" for nothing.
    """

    host_bytes: int | None = None
    reason: str = ""
    output_bytes: int | None = None
    on_each_node: bool = False
    problem: str = ""


def judge(nodes: Facts, needs: Needs, data_problem: str = "") -> list[Check]:
    """Return all checks, in the order in which a start would meet their problems.

    Args:
        data_problem: what is wrong with the beginning of the data; "" for nothing.
    """
    return [
        _versions(nodes),
        _devices(nodes),
        _variables(nodes),
        _model(nodes),
        _data(nodes, data_problem),
        Check(name="arguments", found="the model and the DeepSpeed config can be used", problem=needs.problem, remedy=_REMEDY),
        *_output(nodes, needs),
        *_caches(nodes),
        _memory(nodes, needs),
        _shared_memory(nodes),
        _open_files(nodes),
        _clocks(nodes),
    ]


def _where(nodes: Facts, problem_of: Callable[[Mapping[str, Any]], str]) -> str:
    """Name the nodes with a problem, those with the same one together."""
    hosts: dict[str, list[str]] = {}
    for node in nodes:
        if problem := problem_of(node):
            hosts.setdefault(problem, []).append(node["host"])
    return "; ".join(f"{first_of(names, 5)}: {problem}" for problem, names in hosts.items())


def _agree(nodes: Facts, value_of: Callable[[Mapping[str, Any]], str]) -> str:
    """Return "" if a value is the same on all nodes, else each with its nodes."""
    hosts: dict[str, list[str]] = {}
    for node in nodes:
        hosts.setdefault(value_of(node), []).append(node["host"])
    if len(hosts) < 2:
        return ""
    return "; ".join(f"{value or 'none'} on {first_of(names, 5)}" for value, names in hosts.items())


def _differences(nodes: Facts, fact: str) -> str:
    """Say which of the named values of a fact, such as "versions", are not the same on all nodes."""
    names = dict.fromkeys(name for node in nodes for name in node[fact])
    texts = ((name, _agree(nodes, lambda node, name=name: node[fact].get(name, ""))) for name in names)
    return "; ".join(f"{name}: {text}" for name, text in texts if text)


def _versions(nodes: Facts) -> Check:
    own = nodes[0]["versions"]
    return Check(
        name="versions",
        found=", ".join(f"{name} {own[name] or 'missing'}" for name in ("python", "torch", "deepspeed", "transformers")),
        problem=_differences(nodes, "versions"),
        remedy="install the same versions on all nodes, best in one environment on a shared file system",
    )


def _devices(nodes: Facts) -> Check:
    own = nodes[0]["gpus"]
    ranks, devices = nodes[0]["ranks"], nodes[0]["devices"]
    found = f"{with_count(devices, 'device')} for {with_count(ranks, 'rank')} on each node" if own else "no GPU: CPU ranks"
    if own:
        found += f" ({own['names'][0]}, driver {own['driver']})"

    def too_few(node: Mapping[str, Any]) -> str:
        devices = node["devices"]
        return f"{devices} devices for {node['ranks']} ranks" if node["gpus"] and devices < node["ranks"] else ""

    if problem := _where(nodes, unseen_gpus):
        return Check(name="devices", found=found, problem=problem, remedy=UNSEEN_GPUS_REMEDY)
    problem = _where(nodes, too_few) or _agree(nodes, lambda node: str(node["gpus"].get("driver", "no GPU")))
    return Check(
        name="devices",
        found=found,
        problem=problem,
        remedy="ask for as many GPUs as ranks on each node, of one kind, and let each rank see all of its node",
    )


def unseen_gpus(node: Mapping[str, Any]) -> str:
    """Return "" unless SLURM has given GPUs to a node where DeepSpeed finds none."""
    granted = node["granted_gpus"]
    if not granted or (node["gpus"] and node["devices"]):
        return ""
    return f"SLURM has given {with_count(granted, 'GPU')}, and torch {node['versions']['torch']} finds none"


def _variables(nodes: Facts) -> Check:
    names = sorted({name for node in nodes for name in node["variables"]})
    return Check(
        name="network variables",
        found=first_of(names, 4) or "none set",
        problem=_differences(nodes, "variables"),
        remedy="export the same values on all nodes",
        is_fatal=False,
    )


def _model(nodes: Facts) -> Check:
    own = nodes[0]["model"]
    if own is None:
        return Check(name="model", found="from the hub: fetched at the start")
    problem = _where(nodes, lambda node: (node["model"] or {"problem": "no such folder"}).get("problem", "")) or _agree(
        nodes,
        lambda node: f"config {node['model']['config']}, {node['model']['files']} files, {node['model']['bytes']:,} bytes",
    )
    found = "" if "problem" in own else f"{with_count(own['files'], 'file')}, {format_bytes(own['bytes'])}"
    return Check(
        name="model",
        found=found,
        problem=problem,
        remedy="put the model on a file system that all nodes share, or copy it to every node",
    )


def _data(nodes: Facts, first_problem: str) -> Check:
    count = len(nodes[0]["data"])
    problem = _where(nodes, lambda node: ", ".join(f"{path}: {text}" for path, text in node["data"].items() if text))
    is_everywhere = all(any(node["data"].values()) for node in nodes)
    if not problem and first_problem:
        return Check(name="data", problem=first_problem, remedy=_REMEDY)
    return Check(
        name="data",
        found=with_count(count, "local source") if count else "from the hub",
        problem=problem,
        remedy="check the path; relative ones start from the folder where the job was submitted"
        if is_everywhere
        else "put the data on a file system that all nodes share, or copy it to every node",
    )


def _output(nodes: Facts, needs: Needs) -> Iterator[Check]:
    free = [node["output"]["free"] for node in nodes if node["output"]["free"] is not None]
    shared = all(node["sees_output"] for node in nodes)
    found = f"{format_bytes(min(free))} free" if free else "its free space is not reported"
    found += "" if len(nodes) == 1 else ", shared by all nodes" if shared else ", not shared"
    problem = _where(nodes, lambda node: node["output"]["problem"])
    remedy = "name another --output_dir, or ask for the right to write there"
    if not problem and not shared and not needs.on_each_node:
        problem = _where(nodes, lambda node: "" if node["sees_output"] else "another file system than that of rank 0")
        remedy = "name an --output_dir that all nodes share, or give --save_on_each_node True"
    elif not problem and needs.output_bytes is not None and free and min(free) < needs.output_bytes:
        problem = (
            f"{format_bytes(min(free))} are free, and one checkpoint and the model need {format_bytes(needs.output_bytes)}"
        )
        remedy = "free some space, or name another --output_dir"
    yield Check(name="output", found=found, problem=problem, remedy=remedy)


def _caches(nodes: Facts) -> Iterator[Check]:
    for name in nodes[0]["caches"]:
        yield Check(
            name=name,
            found="writable",
            problem=_where(nodes, lambda node, name=name: node["caches"].get(name, {}).get("problem", "")),
            remedy="free some space, or name a folder that you may write to",
        )


def _memory(nodes: Facts, needs: Needs) -> Check:
    least = min(node["memory"] for node in nodes)
    found = f"{format_bytes(least)} available"
    if needs.host_bytes is None:
        return Check(name="host memory", found=f"{found}; not compared with an estimate: {needs.reason}")
    needed = needs.host_bytes
    return Check(
        name="host memory",
        found=f"{found}, about {format_bytes(needed)} needed on each node",
        problem=_where(nodes, lambda node: f"{format_bytes(node['memory'])} available" if node["memory"] < needed else ""),
        remedy="ask for more memory (sbatch --mem=0: all of the node), more nodes, or see `python -m zero_sft.estimate`",
        is_fatal=False,
    )


def _shared_memory(nodes: Facts) -> Check:
    stale = sum(node["stale"]["count"] for node in nodes)
    problem = _where(
        nodes,
        lambda node: f"{format_bytes(node['shared_memory'])} free" if node["shared_memory"] < LEAST_SHARED_BYTES else "",
    )
    if stale and not problem:
        problem = _where(
            nodes,
            lambda node: (
                f"{with_count(node['stale']['count'], 'file')} of earlier runs ({format_bytes(node['stale']['bytes'])})"
                if node["stale"]["count"]
                else ""
            ),
        )
    return Check(
        name="/dev/shm",
        found=f"{format_bytes(min(node['shared_memory'] for node in nodes))} free",
        problem=problem,
        remedy="remove /dev/shm/zero_sft-* and /dev/shm/deepspeed_allreduce_buffer_* there; give a container more (--shm-size)",
        is_fatal=False,
    )


def _open_files(nodes: Facts) -> Check:
    return Check(
        name="open files",
        found=f"limit {min(node['open_files'] for node in nodes):,}",
        problem=_where(nodes, lambda node: f"limit {node['open_files']:,}" if node["open_files"] < LEAST_OPEN_FILES else ""),
        remedy=f"raise the limit: ulimit -n {LEAST_OPEN_FILES * 4}",
        is_fatal=False,
    )


def _clocks(nodes: Facts) -> Check:
    first = nodes[0]["time"]
    apart = max(abs(node["time"] - first) for node in nodes)
    return Check(
        name="clocks",
        found=f"at most {apart:.1f} s apart",
        problem=_where(
            nodes, lambda node: f"{node['time'] - first:+.0f} s" if abs(node["time"] - first) > MOST_SECONDS_APART else ""
        ),
        remedy="let the nodes take their time from one server (chrony, ntpd): logs and time limits are wrong otherwise",
        is_fatal=False,
    )
