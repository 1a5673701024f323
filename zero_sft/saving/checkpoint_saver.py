"""Save a run's checkpoints while it trains, one at a time.

Training waits only for the copy of what each rank holds to host memory; then a thread of each rank writes the copy. After each
step the ranks ask each other whether all threads are done, and finish the checkpoint together. Without memory for the copy,
training waits until all is written.
"""

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zero_sft.checkpoint.manifest import Manifest
from zero_sft.cluster import failure_report
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.errors import ExportError
from zero_sft.saving import weight_files
from zero_sft.saving.checkpoint_writer import (
    NO_ROOM,
    CheckpointContent,
    CheckpointFolder,
    Progress,
    agree_on_manifest,
    begin_checkpoint,
    describe_checkpoint,
    finish_checkpoint,
    put_in_place,
    removed_on_error,
    write_parts,
)
from zero_sft.saving.export_layout import ExportLayout
from zero_sft.saving.folder import explain_write_errors, file_system_of
from zero_sft.saving.host_copy import CopiedParts, HostCopy, Sizes, copy_nbytes, copy_sizes
from zero_sft.storage import host_memory
from zero_sft.zero import optimizer_state

logger = logging.getLogger("zero_sft.train")

MEMORY_SHARE = 0.5
"""The largest share of a node's available memory that the copies of its ranks take if `save_async` is "auto"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """A complete checkpoint: seconds from the request to the last rename, and those for which training waited.

    `owns_folder` is true on rank 0, and where each node has its own folder, on one rank of each.
    """

    step: int
    nbytes: int
    seconds: float
    blocked_seconds: float
    owns_folder: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A checkpoint that threads write."""

    folder: CheckpointFolder
    content: CheckpointContent
    copied: CopiedParts
    attempt: int
    work: Future[Any]  # of this rank's thread
    manifest: Manifest | None = None  # once all ranks have written their parts, and a thread puts it in place


class CheckpointSaver:
    """Saves the checkpoints of one run. Every rank calls each method, in the same order; all of them communicate.

    Args:
        save_async: "auto" takes memory for a copy if there is enough; not for an optimizer on NVMe, since a copy of its state
            would be in memory.
        output: the folder with the checkpoints, whose file system must stay mounted; None: that is not checked.
        local_folder: a folder on a disk of this node, for the copy; None: it is in memory.
        on_error: "raise" raises the error of a checkpoint that could not be written twice; "continue" logs it.
        on_saved: called on every rank with the folder and the report of each complete checkpoint.
        on_failed: called on every rank with the folder of each checkpoint that could not be written.
    """

    def __init__(
        self,
        world: World,
        *,
        save_async: bool | Literal["auto"],
        output: Path | None = None,
        local_folder: Path | None = None,
        on_error: Literal["raise", "continue"],
        on_saved: Callable[[Path, SaveReport], None],
        on_failed: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._world, self._save_async, self._on_error = world, save_async, on_error
        self._on_saved, self._on_failed, self._local_folder = on_saved, on_failed, local_folder
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory: HostCopy | None = None
        self._file_system: int | None = None  # of the output folder, when the run began
        self._is_without_copy = save_async is False  # also if there was no memory for the first checkpoint's copy
        self._pending: _Pending | None = None
        self._queued: list[Future[object]] = []
        self._started = self._blocked = 0.0  # of the checkpoint that was begun last
        self._write_parts = write_parts
        if output is not None:
            with contextlib.suppress(OSError):
                self._file_system = file_system_of(output)

    def save(
        self,
        engine: Any,
        tensors: Mapping[str, Any],
        target: Path,
        weights: ExportLayout | None,
        small_files: Callable[[], Mapping[str, bytes]],
        progress: Progress,
    ) -> None:
        """Save a checkpoint, or begin to. An earlier one that is not yet written is waited for.

        Args:
            tensors: the tensors of the model, by name.
            target, weights, small_files, progress: as in `describe_checkpoint`.

        Raises:
            ExportError: with `on_error` "raise", it can't be written; nothing of it is left.
        """
        self.wait()
        self._started, self._blocked = time.monotonic(), 0.0
        for attempt in (1, 2):
            try:
                with self._blocking():
                    self._require_same_file_system(target)
                    content = describe_checkpoint(engine, tensors, target, weights, small_files, progress, self._world)
                    written = self._write(engine, tensors, content, attempt)
            except ExportError as error:
                if not self._tries_again(target, progress.step, attempt, error):
                    return
            else:
                if written is not None:
                    self._report(content, *written)
                return

    def _require_same_file_system(self, target: Path) -> None:
        """Check that the output folder is still mounted. Without its file system, the folder below the mount would be filled.

        Raises:
            ExportError: on every rank; it is on another file system than at the start of the run.
        """
        with collective_stage(self._world, f"looking at {target.parent}"), explain_write_errors(target):
            if self._file_system is not None and self._file_system != file_system_of(target.parent):
                raise ExportError(
                    f"{target.parent} is not on the file system on which it was when the run began: its mount on "
                    f"{socket.gethostname()} is gone, or another one is in its place. Mount it again.",
                    code="export.other_file_system",
                )

    def write_with(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap the function that writes this rank's part. Does not communicate."""
        self._write_parts = wrap(self._write_parts)

    def run_in_thread(self, action: Callable[[], object]) -> None:
        """Queue an action for this rank's thread; `wait` waits for it. Does not communicate."""
        self._queued = [each for each in self._queued if not each.done()] + [self._executor.submit(action)]

    def poll(self) -> None:
        """Finish the checkpoint that threads write, if all of them are done. To be called after each step.

        Raises:
            ExportError: as in `save`.
        """
        if self._pending is None:
            return
        with self._blocking():
            are_done = all(all_gather_json(self._world, self._pending.work.done()))
        if are_done:
            self._advance()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            ExportError: as in `save`.
        """
        while self._pending is not None:
            activity = f"waiting for {self._pending.content.target.name}"
            with progress.task(activity), failure_report.activity(activity):
                self._advance()
        for queued in self._queued:
            queued.result()

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        """Add the time inside to that for which training has waited."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._blocked += time.monotonic() - began

    def _write(
        self, engine: Any, tensors: Mapping[str, Any], content: CheckpointContent, attempt: int
    ) -> tuple[CheckpointFolder, Manifest] | None:
        """Write a checkpoint and return its hidden folder and its manifest; None if a thread writes it."""
        is_main = self._world.is_main
        folder = begin_checkpoint(content, self._world)
        with removed_on_error(folder.path, content, self._world):
            memory = self._memory_for_copy(engine, tensors, content)
        parts = weight_files.weight_parts(tensors, is_main=is_main or content.on_each_node)
        states = optimizer_state.parameter_states(engine)
        if memory is None:
            manifest = agree_on_manifest(
                folder, content, lambda: self._write_parts(folder, content, parts, states, is_main=is_main), self._world
            )
            finish_checkpoint(folder, content, lambda: put_in_place(folder.path, content.target, manifest), self._world)
            return folder, manifest
        stage = collective_stage(self._world, f"copying {content.target.name}")
        with removed_on_error(folder.path, content, self._world), stage:
            copied = memory.take(parts, states)
        self._write_in_thread(folder, content, copied, attempt)
        return None

    def _write_in_thread(self, folder: CheckpointFolder, content: CheckpointContent, copied: CopiedParts, attempt: int) -> None:
        work = self._executor.submit(
            self._write_parts, folder, content, copied.weights, copied.states, is_main=self._world.is_main
        )
        self._pending = _Pending(folder=folder, content=content, copied=copied, attempt=attempt, work=work)

    def _advance(self) -> None:
        """Take the next step of a pending checkpoint; after an error, begin to write its copy once more."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        folder, content = pending.folder, pending.content
        try:
            with self._blocking():
                if pending.manifest is None:
                    manifest = agree_on_manifest(folder, content, pending.work.result, self._world)
                    self._pending = self._placing(pending, manifest)
                else:
                    finish_checkpoint(folder, content, pending.work.result, self._world)
        except ExportError as error:
            if self._tries_again(content.target, content.progress.step, pending.attempt, error):
                self._write_again(content, pending.copied, pending.attempt + 1)
            return
        if pending.manifest is not None:
            self._report(content, folder, pending.manifest)

    def _placing(self, pending: _Pending, manifest: Manifest) -> _Pending:
        """Let a thread of each rank that owns a folder put it in its place."""

        def place() -> None:
            if pending.folder.is_owned:
                put_in_place(pending.folder.path, pending.content.target, manifest)

        return dataclasses.replace(pending, manifest=manifest, work=self._executor.submit(place))

    def _write_again(self, content: CheckpointContent, copied: CopiedParts, attempt: int) -> None:
        try:
            with self._blocking():
                self._require_same_file_system(content.target)
                folder = begin_checkpoint(content, self._world)
        except ExportError as error:
            self._tries_again(content.target, content.progress.step, attempt, error)
        else:
            self._write_in_thread(folder, content, copied, attempt)

    def _tries_again(self, target: Path, step: int, attempt: int, error: ExportError) -> bool:
        """Log the error of an attempt, and return whether there is another. After the last one, raise it with "raise"."""
        is_last = attempt > 1 or error.code == NO_ROOM
        if is_last:
            self._on_failed(target)
        if is_last and self._on_error == "raise":
            raise error
        if self._world.is_main:
            what = f"no checkpoint is saved at step {step}" if is_last else f"{target.name} is written once more"
            logger.warning("%s: %s", what, error)
        return not is_last

    def _report(self, content: CheckpointContent, folder: CheckpointFolder, manifest: Manifest) -> None:
        report = SaveReport(
            step=content.progress.step,
            nbytes=manifest.nbytes,
            seconds=time.monotonic() - self._started,
            blocked_seconds=self._blocked,
            owns_folder=folder.is_owned,
        )
        logger.info(
            "%s: %s in %.1f s; training waited %.1f s",
            content.target.name, progress.format_bytes(report.nbytes), report.seconds, report.blocked_seconds,
        )  # fmt: skip
        self._on_saved(content.target, report)

    def _memory_for_copy(self, engine: Any, tensors: Mapping[str, Any], content: CheckpointContent) -> HostCopy | None:
        """Return memory for a copy of what this rank holds; None if the run saves without a copy."""
        if self._is_without_copy:
            return None
        sizes = copy_sizes(tensors, content.optimizer, is_main=self._world.is_main or content.on_each_node)
        if self._memory is None or self._memory.sizes != sizes:
            self._memory = None  # freed before the next is allocated
            self._memory = self._allocate(engine, sizes)
            self._is_without_copy = self._memory is None
        return self._memory

    def _allocate(self, engine: Any, sizes: Sizes) -> HostCopy | None:
        """Allocate the memory on every rank, or on none."""
        nbytes, memory, reason = copy_nbytes(sizes, self._local_folder), None, ""
        if self._save_async == "auto" and self._local_folder is None:
            if optimizer_state.is_on_nvme(engine):
                reason = "the optimizer's state is on NVMe, and its copy would be in memory"
            else:
                reason = self._too_little_memory(nbytes)
        with collective_stage(self._world, "reserving memory for checkpoints") as exchange:
            if not reason:
                try:
                    memory = HostCopy(sizes, self._local_folder)
                except (MemoryError, RuntimeError, OSError) as error:
                    where = "of memory" if self._local_folder is None else f"in {self._local_folder}"
                    reason = f"{progress.format_bytes(nbytes)} {where} could not be allocated: {error}"
            exchange.local = reason
        reasons = [reason for reason in exchange.gathered if reason]
        if not reasons:
            if self._local_folder is not None:
                size = progress.format_bytes(nbytes)
                logger.info("checkpoints are copied to %s first: %s of this rank", self._local_folder, size)
            return memory
        if self._world.is_main:
            was_asked_for = self._save_async is True or self._local_folder is not None
            level = logging.WARNING if was_asked_for else logging.INFO
            logger.log(level, "training waits while a checkpoint is written: %s", reasons[0])
        return None

    def _too_little_memory(self, nbytes: int) -> str:
        """Say why the copies of this node's ranks would take too much of its memory; "" if they don't."""
        world = self._world
        rows = all_gather_json(world, [world.node_leader, nbytes, host_memory.available_bytes()])
        own = [(needed, available) for leader, needed, available in rows if leader == world.node_leader]
        needed, available = sum(needed for needed, _ in own), min(available for _, available in own)
        if needed <= MEMORY_SHARE * available:
            return ""
        return (
            f"a copy of it takes {progress.format_bytes(needed)} of a node's memory, which has "
            f"{progress.format_bytes(available)} left. Give --save_async True to copy it nevertheless"
        )
