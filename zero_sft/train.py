"""Run the fine-tuning job: arguments → config → tokenizer → data → model → training → export.

    deepspeed --num_gpus 8 -m zero_sft.train --model_name_or_path ... --data_path ...

Every rank runs `main`. Cheap checks come first, so that bad input is found before the weights are read. Each stage with such
checks is a `collective_stage`: all ranks leave with the same error, which rank 0 prints once. TRL's `SFTTrainer` does the
training, on the Hugging Face Trainer and DeepSpeed.

Functions import the modules that need torch, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.arguments import ParsedArguments, answer_help, parse, wants_help
from zero_sft.arguments.faults import parse_faults, require_ranks
from zero_sft.cluster import early_end, stage_watch
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.launcher_watch import leave
from zero_sft.cluster.node_facts import granted_gpus, versions
from zero_sft.cluster.rank_main import run_rank
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.console.log import close_console, copy_log_to, open_console, silence_transformers
from zero_sft.errors import ArgumentError, ConfigError, DistributedError
from zero_sft.launcher import launch_note
from zero_sft.printable import with_count

if TYPE_CHECKING:
    from zero_sft.data.dataset import PreparedDataset
    from zero_sft.job.inputs import Inputs
    from zero_sft.job.run_folder import RunFolder
    from zero_sft.job.timeline import Timeline

logger = logging.getLogger("zero_sft.train")  # not __name__, which is "__main__" in a run

ANSWER_TOKENS = 256
"""The maximum length of an answer to a sample prompt, in tokens; most answers are shorter."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return the exit status. Every rank; communicates."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        return answer_help(argv)

    def job(world: World) -> None:
        open_console(world)
        try:
            run(parse(argv), world)
        finally:
            close_console()

    return run_rank(job)


def run(parsed: ParsedArguments, world: World) -> None:
    """Fine-tune and export. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    from zero_sft.cluster.stages import collective_stage, require_identical
    from zero_sft.data import temporary_folders
    from zero_sft.job.inputs import read_inputs
    from zero_sft.job.later_start import resumed_if_started_again
    from zero_sft.job.load_model import load_for_training
    from zero_sft.job.start_checks import require_room_for_run
    from zero_sft.job.timeline import Timeline
    from zero_sft.zero.process_group import connect

    if parsed.training.get("disable_tqdm"):
        open_console(world, bars=False)
    for note in (*parsed.notes, launch_note()):
        if note:
            logger.info(note)
    timeline = Timeline()
    timeline.end("imports")
    ranks = with_count(world.world_size, "rank")
    logger.info("starting %s", ranks)
    with failure.activity("joining the ranks"), progress.task("starting DeepSpeed"):
        world = connect(world)
    logger.info("%s on %s", ranks, _device(world))
    silence_transformers(world)
    # Ranks with different arguments would call different collectives and hang.
    require_identical(world, "arguments", _shown(parsed))
    require_identical(world, "versions of the libraries", versions())
    with collective_stage(world, "checking --simulate_fault"):
        if parsed.training.get("simulate_fault"):
            require_ranks(parse_faults(parsed.training["simulate_fault"]), world.world_size)
    timeline.end("joining")
    with (
        contextlib.ExitStack() as cleanup,
        stage_watch.watching(leave, parsed.training.get("stage_timeout")),
        _sole_run(parsed.training["output_dir"], world),
    ):
        failure.set_activity("preparing tokenizer and data")
        parsed = resumed_if_started_again(parsed, world)
        cleanup.callback(temporary_folders.remove_own)
        inputs = read_inputs(parsed, world)
        failure.set_log_folder(inputs.log_folder)
        timeline.end("inputs")
        require_room_for_run(inputs, world)
        failure.set_activity("loading the model")
        model = load_for_training(parsed, inputs, world)
        timeline.end("load")
        with early_end.deferring():  # the first signal ends the training at a step, and lets an export finish
            _train_and_export(parsed, model, inputs, world, timeline)


@contextlib.contextmanager
def _sole_run(output_dir: str, world: World) -> Iterator[None]:
    """Hold the lock on the output folder on rank 0. Every rank; communicates.

    Raises:
        ArgumentError: another run holds it.
    """
    from zero_sft.cluster.stages import collective_stage
    from zero_sft.saving.folder_lock import lock

    with contextlib.ExitStack() as stack:
        with collective_stage(world, "locking the output folder"):
            if world.is_main:
                stack.enter_context(lock(output_dir))
        yield


def _device(world: World) -> str:
    """Describe the device that DeepSpeed has chosen, for the log. Every rank; communicates.

    Raises:
        ConfigError: it has chosen the CPU, though SLURM has given GPUs to the job.
    """
    from deepspeed.accelerator import get_accelerator

    from zero_sft.cluster.stages import collective_stage

    accelerator: Any = get_accelerator()
    kind = accelerator.device_name().partition(":")[0]
    with collective_stage(world, "looking at the devices"):
        if kind == "cpu" and (granted := granted_gpus(os.environ)):
            raise ConfigError(
                f"SLURM has given {with_count(granted, 'GPU')} of {socket.gethostname()} to this job, and torch "
                f"{versions()['torch']} finds none. Install a torch for the nodes' CUDA release, not one for CPUs (+cpu), and "
                "see what nvidia-smi says there; to train on the CPUs, export DS_ACCELERATOR=cpu.",
                code="cluster.gpus_not_found",
            )
    return "CPU: DeepSpeed finds no GPU" if kind == "cpu" else f"{kind} ({accelerator.communication_backend_name()})"


def _train_and_export(parsed: ParsedArguments, model: Any, inputs: "Inputs", world: World, timeline: "Timeline") -> None:
    from transformers import set_seed

    from zero_sft.job.answering import AnswerPrompts
    from zero_sft.job.wall_time import WallTime, shares_line
    from zero_sft.saving.export import export_or_rescue
    from zero_sft.zero import gather_hooks as gather

    output, report = Path(inputs.arguments.output_dir), model.load_report
    failure.set_activity("answering prompts")
    before = []
    if inputs.prompts:
        with gather.summon_full_params(model):
            before = _answers(model, inputs)
        timeline.end("answers before")
    failure.set_activity("preparing the training")
    set_seed(inputs.arguments.seed)  # again, since the load has drawn random numbers
    trainer = _trainer(model, inputs, world, timeline)
    _remove_earlier_checkpoints(output, inputs, world)
    run_folder = _open_run_folder(parsed, trainer, inputs, world)
    wall_time = WallTime(
        lambda: timeline.seconds, lambda: trainer.checkpoints.blocked_seconds, lambda: trainer.seconds_waited_for_data
    )
    trainer.add_callback(wall_time)
    trainer.add_callback(
        AnswerPrompts(inputs.prompts, parsed.data.sample_every, lambda: _answers_of_engine(trainer, inputs), run_folder)
    )
    origin = f" from the checkpoint {inputs.checkpoint.folder}, whose files are intact" if inputs.checkpoint else ""
    logger.info("starting the engine%s", origin)
    failure.set_activity(lambda: f"training, in step {trainer.state.global_step + 1} of {trainer.state.max_steps}")
    late_error = trainer.train_to_the_end(inputs.checkpoint and inputs.checkpoint.folder)
    seconds = wall_time.seconds(time.time() - timeline.began)
    logger.info(shares_line(seconds))
    if run_folder is not None:
        run_folder.end(step=trainer.state.global_step, seconds=seconds)
    trainer.require_last_step()
    logger.info("writing the model to %s", output)
    failure.set_activity("writing the model")
    export_or_rescue(
        lambda folder: trainer.export_result(folder, merge=parsed.lora.merge_adapter), output, world
    )  # before anything else that may fail
    failure.set_activity("answering prompts")
    after = _answers_of_engine(trainer, inputs)
    answers = zip(inputs.prompts, before, after, strict=True)
    logs = {
        "arguments": _shown(parsed),
        "history": trainer.state.log_history,
        "load_report": report.to_dict(),
        "timeline": timeline.seconds,
        "answers": [dict(zip(("prompt", "before", "after"), answer, strict=True)) for answer in answers],
    }
    _write_logs_and_raise(logs, trainer, late_error, inputs, world)
    _upload(trainer, inputs, world)
    trainer.model_wrapped.destroy()  # end DeepSpeed's threads before the interpreter exits


def _remove_earlier_checkpoints(output: Path, inputs: "Inputs", world: World) -> None:
    """Remove unfinished checkpoints, and those of an earlier run that is overwritten. Every rank; communicates."""
    from zero_sft.cluster.stages import collective_stage
    from zero_sft.saving.earlier_run import remove_checkpoints, remove_leftovers
    from zero_sft.saving.folder import explain_write_errors

    with collective_stage(world, "removing the earlier run's checkpoints"), explain_write_errors(output):
        if world.leads_folder(on_each_node=inputs.arguments.save_on_each_node):
            remove_leftovers(output)
            if inputs.overwrites_run:
                remove_checkpoints(output)


def _open_run_folder(parsed: ParsedArguments, trainer: Any, inputs: "Inputs", world: World) -> "RunFolder | None":
    """Begin the files in the log folder that grow while the run goes on; None on ranks other than 0. Does not communicate."""
    from zero_sft.job.run_folder import RunFolder, WriteMetrics
    from zero_sft.saving.earlier_run import is_in

    if not world.is_main:
        return None
    folder, checkpoint = inputs.log_folder, inputs.checkpoint
    run_folder = RunFolder(folder, is_resumed=is_in(checkpoint and checkpoint.folder, folder.parent))
    try:
        copy_log_to(folder / failure.TRAIN_LOG, append=bool(run_folder.starts()))
    except OSError as error:
        logger.warning("the log can't be copied to %s: %s", folder, error)
    data = {"names": list(inputs.record.data), "digests": inputs.training_data.keys}
    run_folder.begin(_shown(parsed), world.world_size, data, checkpoint.global_step if checkpoint else 0)
    trainer.add_callback(WriteMetrics(run_folder, _title(inputs)))
    trainer.checkpoints.on_complete = lambda report: run_folder.add({"event": "checkpoint", **dataclasses.asdict(report)})
    return run_folder


def _title(inputs: "Inputs") -> str:
    return f"Loss of {Path(inputs.model_source.name).name}, {inputs.log_folder.parent}"


def _trainer(model: Any, inputs: "Inputs", world: World, timeline: "Timeline") -> Any:
    from zero_sft.job.loss_checks import LossChecks
    from zero_sft.job.restart_record import RestartRecord
    from zero_sft.job.simulated_faults import SimulatedFaults
    from zero_sft.job.slow_ranks import SlowRanks
    from zero_sft.job.steps import StepLog
    from zero_sft.job.stream_place import StreamPosition
    from zero_sft.job.trainer import JobTrainer, LogLastStep, collator_for
    from zero_sft.job.watching import WatchSteps

    arguments = inputs.arguments
    multiple_of = math.lcm(arguments.pad_to_multiple_of or 1, arguments.sequence_parallel_size)
    faults = SimulatedFaults(parse_faults(arguments.simulate_fault) if arguments.simulate_fault else (), world)
    try:
        trainer = JobTrainer(
            faults=faults,
            model=model,
            args=inputs.arguments,
            saved_tokenizer=inputs.saved_tokenizer,
            record=inputs.record,
            world=world,
            train_dataset=inputs.training_data.rows,
            eval_dataset=_evaluation_rows(inputs.evaluation_data),
            processing_class=inputs.tokenizer,
            data_collator=collator_for(model, inputs.tokenizer, multiple_of),
            callbacks=[LogLastStep()],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # about the arguments, so the same on every rank
        raise ArgumentError(f"the trainer refuses these arguments: {error}", code="arguments.trainer_refuses") from error
    row_name = "packed rows" if inputs.training_data.is_packed else "samples"
    if inputs.stream_place is not None:
        trainer.add_callback(StreamPosition(inputs.training_data, inputs.record.samples_a_step, inputs.stream_place.data))
    log = StepLog(lambda: trainer.tokens, row_name, timeline, lambda: trainer.flops_per_token)
    trainer.add_callback(log)
    checks = LossChecks(
        trainer,
        inputs.training_data.recent_samples,
        world,
        on_nan=arguments.on_nan,
        spike_factor=arguments.spike_factor,
        roll_back=trainer.checkpoints.roll_back,
    )
    trainer.add_callback(checks)
    trainer.add_callback(RestartRecord(world, lambda: trainer.newest_checkpoint_step, checks.places))
    trainer.add_callback(SlowRanks(trainer, world))
    trainer.add_callback(WatchSteps(inputs.log_folder, world, arguments.step_timeout))
    trainer.add_callback(faults)  # after the watch has begun
    log.wait_for_engine()
    return trainer


def _answers(model: Any, inputs: "Inputs") -> list[str]:
    from zero_sft.job.generation import answer

    logger.info("answering %s", with_count(len(inputs.prompts), "prompt"))
    with progress.task("answering prompts"), stage_watch.during("answering prompts"):
        return answer(model, inputs.tokenizer, inputs.prompts, template=inputs.template, max_new_tokens=ANSWER_TOKENS)


def _answers_of_engine(trainer: Any, inputs: "Inputs") -> list[str]:
    """Answer the prompts after the training. Every rank; communicates.

    A small model is gathered once for all tokens, a large model module by module for each token.
    """
    if not inputs.prompts:
        return []
    from trl.models.utils import unwrap_model_for_generation

    from zero_sft.zero import gather_hooks as gather

    gather_once = gather.is_small(trainer.model)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=gather_once) as model:
        return _answers(model, inputs)


def _write_logs_and_raise(
    logs: Mapping[str, Any], trainer: Any, late_error: Exception | None, inputs: "Inputs", world: World
) -> None:
    """Write the logs, then raise an error that came after the last step. Every rank; communicates."""
    from zero_sft.cluster.stages import collective_stage

    with collective_stage(world, "writing the logs"):
        if world.is_main:
            curve = _write_log_files(inputs, logs)
            _log_results(inputs, logs, curve, trainer.state.best_model_checkpoint)
    with collective_stage(world, "ending the training"):
        if late_error is not None:
            raise DistributedError(
                f"after the last step: {type(late_error).__name__}: {late_error}. The model is complete, "
                f"as it was after the last step, in {inputs.arguments.output_dir}.",
                code="cluster.failed_after_last_step",
            ) from late_error


def _upload(trainer: Any, inputs: "Inputs", world: World) -> None:
    """Upload the model with its card to the hub, if that was asked for. Every rank; communicates.

    Raises:
        ExportError: the hub can't be reached, or refuses.
    """
    from zero_sft.cluster.control_group import LONG_WAIT
    from zero_sft.cluster.stages import collective_stage
    from zero_sft.errors import ExportError
    from zero_sft.hub.upload import upload
    from zero_sft.saving.folder import explain_write_errors
    from zero_sft.saving.model_card import add_card, files_of_model

    if inputs.repository is None:
        return
    folder, name = inputs.log_folder.parent, inputs.repository.rpartition("/")[2]
    logger.info("uploading the model to %s", inputs.repository)
    failure.set_activity("uploading the model")
    with collective_stage(world, "uploading the model", LONG_WAIT):
        if world.is_main:
            curve = inputs.log_folder / "loss.png"
            with explain_write_errors(folder):
                add_card(folder, name, inputs.record, trainer.state.log_history, world.world_size, curve)
            try:
                logger.info("uploaded: %s", upload(folder, inputs.repository, f"Train {name}", files_of_model(folder)))
            except ExportError as error:
                raise ExportError(
                    f"{error} The model is complete in {folder}: `hf upload {inputs.repository} {folder}` uploads it.",
                    code=error.code,
                ) from error


def _write_log_files(inputs: "Inputs", logs: Mapping[str, Any]) -> str:
    """Write each of `logs` to a JSON file, and the loss curve; log a warning if that fails. Rank 0.

    Returns:
        The path of the loss curve, or the reason why there is none.
    """
    from zero_sft.job.loss_plot import plot_loss

    folder = inputs.log_folder
    curve = folder / "loss.png"
    try:
        folder.mkdir(exist_ok=True)
        curve.unlink(missing_ok=True)  # from an earlier run
        for name, content in logs.items():
            path = folder / f"{name}.json"
            path.unlink(missing_ok=True)
            if content:
                text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
        is_drawn = plot_loss(logs["history"], curve, _title(inputs))
    except Exception as error:  # noqa: BLE001 - the model is saved, so the run must not end with an error
        logger.warning("the logs can't be written to %s: %s. The model is complete.", folder, error)
        return "none: it could not be written"
    return str(curve) if is_drawn else "none: no loss was logged (see --logging_steps)"


def _log_results(inputs: "Inputs", logs: Mapping[str, Any], curve: str, best_checkpoint: str | None) -> None:
    """Log the answers, the losses and the places of the results. Rank 0.

    Args:
        curve: the result of `_write_log_files`.
    """
    for answer in logs["answers"]:
        logger.info("prompt: %s\nbefore: %s\nafter:  %s", answer["prompt"], answer["before"], answer["after"])
    losses = [(entry["step"], entry["eval_loss"]) for entry in logs["history"] if "eval_loss" in entry]
    if len(losses) > 1:
        (first, before), (last, after) = losses[0], losses[-1]
        change = f" ({100 * (after / before - 1):+.1f} %)" if math.isfinite(before) and math.isfinite(after) else ""
        when = f"after step {first}" if first else "before training"
        logger.info("loss on held-out samples: %.3f %s, %.3f after step %d%s", before, when, after, last, change)
    if best_checkpoint and inputs.arguments.load_best_model_at_end:
        best = Path(best_checkpoint).name
        logger.info("the exported model is that of %s, the best of the run (--load_best_model_at_end)", best)
    logs_folder = inputs.log_folder
    logger.info("model:      %s\nloss curve: %s\nlogs:       %s", logs_folder.parent, curve, logs_folder)


def _evaluation_rows(sets: Mapping[str, "PreparedDataset"]) -> Any:
    """Return the Trainer's evaluation data: None, one dataset, or several by name."""
    rows = {name: prepared.rows for name, prepared in sets.items()}
    return rows.get("", rows or None)


def _shown(parsed: ParsedArguments) -> dict[str, Any]:
    """Return all arguments without the token and what may be secret in URLs, to be compared and logged."""
    from zero_sft.data.sources.data_path import shown_sources

    model = {key: value for key, value in dataclasses.asdict(parsed.model).items() if key != "token"}
    data = dataclasses.asdict(parsed.data)
    for name in ("data_path", "eval_data_path"):
        data[name] = None if data[name] is None else shown_sources(data[name])
    return {**model, **data, **dataclasses.asdict(parsed.lora), **parsed.training}


if __name__ == "__main__":
    status = main()
    if status:
        leave(status)  # a normal exit of the interpreter may wait for ranks that are gone
    sys.exit(status)
