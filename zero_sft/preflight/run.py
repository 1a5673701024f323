"""The preflight: the ranks meet, exchange the facts of their nodes, and try the network. Every rank.

The ranks meet in a store that has its time limit, so that a rank that does not come is named. The facts travel through
the store, so that the table is there even if no collective works.
"""

import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.arguments import ParsedArguments, answer_help, parse, wants_help
from zero_sft.cluster.deepspeed_command import is_free
from zero_sft.cluster.node_facts import collect
from zero_sft.cluster.rank_main import run_rank
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError, CheckpointError, ConfigError, DistributedError, ZeroSftError
from zero_sft.paths import nearest_existing
from zero_sft.preflight.checks import Check, Needs, judge
from zero_sft.printable import excerpt, first_of, printable, with_count

MEETING_SECONDS = 60
"""The time for all ranks to come, unless the variable has another."""
MEETING_VARIABLE = "ZERO_SFT_PREFLIGHT_SECONDS"

ESTIMATE_SECONDS = 600
"""The longest time that the other ranks wait while rank 0 estimates the memory of a large model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the preflight and return the exit status: 0 if no check has failed. Every rank; communicates."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        return answer_help(argv)
    has_failed: list[bool] = []
    status = run_rank(lambda world: has_failed.append(_run(parse(argv), world)))
    return status or int(any(has_failed))


def _run(parsed: ParsedArguments, world: World) -> bool:
    """Return whether a check has failed."""
    began = time.monotonic()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from zero_sft.zero.process_group import set_meeting_place

    try:
        output = Path(parsed.training["output_dir"]).expanduser()
    except RuntimeError as error:  # no such user
        raise ArgumentError(f"--output_dir {parsed.training['output_dir']}: {error}", code="arguments.wrong_value") from error
    facts = _facts(parsed, output) if world.local_rank == 0 else {}
    set_meeting_place(world)
    store = _meet(world)
    facts |= {"time": time.time(), "ranks": world.local_world_size, "devices": _devices()} if facts else {}
    store.set_timeout(datetime.timedelta(seconds=ESTIMATE_SECONDS))
    with _marker(output, world, store) as sees_output:
        store.set(f"facts/{world.rank}", json.dumps({**facts, "sees_output": sees_output} if facts else {}))
        checks: list[Check] = []
        if world.is_main:
            gathered = [json.loads(store.get(f"facts/{rank}")) for rank in range(world.world_size)]
            nodes = [each for each in gathered if each]
            checks = judge(nodes, _needs(parsed, world), _first_samples_problem(parsed))
            _print_table(checks, nodes, world)
            store.set("failed", "1" if any(check.state == "FAILED" for check in checks) else "0")
        has_failed = store.get("failed") == b"1"
        store.set(f"done/{world.rank}", "1")
        if world.is_main:
            store.wait([f"done/{rank}" for rank in range(world.world_size)], datetime.timedelta(seconds=_meeting_seconds()))
    del store
    if not has_failed:
        _try_network(world)
    if world.is_main:
        verdict = "a run would fail: see FAILED above" if has_failed else "nothing would hinder a run"
        _print(f"{verdict} ({time.monotonic() - began:.0f} s)")
    return has_failed


def _meeting_seconds() -> int:
    """Return how long ranks wait for each other.

    Raises:
        ConfigError: the variable for it is not a number.
    """
    text = os.environ.get(MEETING_VARIABLE, str(MEETING_SECONDS))
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise ConfigError(f"{MEETING_VARIABLE}={text} is not a number of seconds: unset it.", code="preflight.bad_seconds")
    return int(text)


def _facts(parsed: ParsedArguments, output: Path) -> dict[str, Any]:
    from zero_sft.data.sources.data_path import HubDataset, all_sources
    from zero_sft.hub.options import HubOptions
    from zero_sft.hub.source import local_folder
    from zero_sft.options.keywords import pick_options

    name = str(parsed.model.model_name_or_path)
    try:
        model = local_folder(name, pick_options(HubOptions, parsed.model))
    except CheckpointError:  # a path that is not there: the table says on which nodes
        model = Path(name).expanduser()
    sources: list[Path] = []
    for text in (parsed.data.data_path, parsed.data.eval_data_path):
        if text:
            sources += [Path(source.text) for source in all_sources(text) if not isinstance(source.data, HubDataset)]
    caches = {"cache": Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()}
    if parsed.data.data_cache_dir:
        caches["data cache"] = Path(parsed.data.data_cache_dir).expanduser()
    return collect(model=model, data=sources, output=output, caches=caches)


def _meet(world: World) -> Any:
    """Return the store in which all ranks have met.

    Raises:
        DistributedError: some ranks have not come in time; the message names them, and their nodes where SLURM tells them.
    """
    import torch.distributed as dist

    from zero_sft.zero.process_group import port_taken

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = _meeting_seconds()
    limit = datetime.timedelta(seconds=seconds)
    if world.is_main and not is_free(port):
        raise port_taken(port)
    try:
        store = dist.TCPStore(address, port, world.world_size, world.is_main, timeout=limit, wait_for_workers=False)
    except dist.DistError as error:
        raise DistributedError(
            f"rank {world.rank} on {socket.gethostname()} can't reach rank 0 at {address}:{port} within {seconds} s. "
            "Check the name, the network between the nodes and their firewall; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "choose the interface.",
            code="preflight.no_rank_0",
        ) from error
    store = dist.PrefixStore("preflight", store)
    store.set(f"here/{world.rank}", socket.gethostname())
    if not world.is_main:
        store.get("met")
        return store
    deadline = time.monotonic() + seconds
    missing = list(range(world.world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        time.sleep(0.1)
    store.set("met", "1")
    if missing:
        raise DistributedError(
            f"{with_count(len(missing), 'rank')} of {world.world_size} did not come within {seconds} s: rank "
            f"{first_of(missing, 8)}{_nodes_of(missing)}. Check these nodes: is the Python environment there, does the process "
            "start, does the network reach this node?",
            code="preflight.ranks_missing",
        )
    return store


def _nodes_of(ranks: Sequence[int]) -> str:
    """Return the nodes of ranks, as far as SLURM's variables tell them."""
    from zero_sft.cluster.rendezvous import hosts_of_list

    nodes = hosts_of_list(os.environ.get("SLURM_STEP_NODELIST", ""))
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if not nodes or not per_node.isdecimal():
        return ""
    names = dict.fromkeys(nodes[rank // int(per_node)] for rank in ranks if rank // int(per_node) < len(nodes))
    return f" on {first_of(list(names), 8)}"


def _devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def _marker(output: Path, world: World, store: Any) -> Any:
    """Yield whether this rank sees a file that rank 0 makes next to the output folder."""
    place = nearest_existing(output)
    path: Path | None = None
    if world.is_main:
        name = f".zero_sft-preflight-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            for left in place.glob(".zero_sft-preflight-*"):  # by one that was killed
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
            path = place / name
            path.write_bytes(b"")
        store.set("marker", json.dumps([str(place), name]))
    folder, name = json.loads(store.get("marker"))
    try:
        yield (Path(folder) / name).exists()
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _first_samples_problem(parsed: ParsedArguments) -> str:
    """Return what is wrong with the beginning of a source of data, of a dataset on the hub not; "" for nothing."""
    from zero_sft.data.sources.data_path import HubDataset, all_sources
    from zero_sft.data.sources.objects import read_objects

    try:
        for text in filter(None, (parsed.data.data_path, parsed.data.eval_data_path)):
            for source in all_sources(text):
                if not isinstance(source.data, HubDataset):
                    for path in source.data.chosen().files[:1]:
                        next(read_objects(path), None)
    except ZeroSftError as error:
        return " ".join(error.with_code.split())
    return ""


def _needs(parsed: ParsedArguments, world: World) -> Needs:
    """Estimate what the run needs. Rank 0; a model that can't be estimated gives needs without sizes."""
    on_each_node = bool(parsed.training.get("save_on_each_node"))
    try:
        from zero_sft.estimate.memory_needs import MemoryModel, TrainingRun
        from zero_sft.estimate.model import find_model
        from zero_sft.hub.options import HubOptions
        from zero_sft.loading.options import LoadOptions
        from zero_sft.options.keywords import pick_options

        model = find_model(
            str(parsed.model.model_name_or_path),
            pick_options(HubOptions, parsed.model),
            pick_options(LoadOptions, parsed.model),
        )
        run = TrainingRun(
            world_size=world.world_size,
            ranks_per_node=world.local_world_size,
            ds_config=parsed.training.get("deepspeed") or "zero3",
            batch_size=parsed.training.get("per_device_train_batch_size", 1),
            length=min(parsed.training.get("model_max_length", 2048), 2048),  # activations are on the device
            checkpointing=True,
            packing=False,
            device_bytes=2**60,
            host_bytes=2**60,
            save_async=False,
        )
        needs = MemoryModel(model).needs(run)
        state_bytes = 12 if parsed.training.get("save_strategy") != "no" else 0
        output_bytes = model.numel * (state_bytes + 2 * model.spec.dtype.itemsize)
        return Needs(host_bytes=needs.host, output_bytes=output_bytes, on_each_node=on_each_node)
    except ZeroSftError as error:
        runs_nevertheless = error.code == "estimate.activations_uncountable"
        reason, problem = (excerpt(error), "") if runs_nevertheless else ("see arguments", " ".join(error.with_code.split()))
        return Needs(reason=reason, problem=problem, on_each_node=on_each_node)


def _try_network(world: World) -> None:
    """Join the ranks as the job does, and sum a number over all of them. Every rank; communicates."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from zero_sft.zero.process_group import connect

    connected = connect(world)
    accelerator: Any = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    began = time.monotonic()
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    seconds = time.monotonic() - began
    if int(total) != world.world_size:
        raise DistributedError(
            f"a sum over {world.world_size} ranks gave {int(total)}: the network library is broken.", code="preflight.wrong_sum"
        )
    if connected.is_main:
        _print_row(
            "network",
            "ok",
            f"a number summed on {with_count(world.world_size, 'rank')} in {seconds:.2f} s ({dist.get_backend()})",
        )


def _print_table(checks: Sequence[Check], nodes: Sequence[Mapping[str, Any]], world: World) -> None:
    hosts = [str(node["host"]) for node in nodes]
    _print(f"{with_count(world.world_size, 'rank')} on {with_count(len(nodes), 'node')}: {first_of(hosts, 16)}")
    for check in checks:
        _print_row(check.name, check.state, check.problem or check.found)
        if check.problem:
            _print_row("", "", f"→ {check.remedy}")


def _print_row(name: str, state: str, text: str) -> None:
    _print(f"  {name:18} {state:8} {text}")


def _print(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
