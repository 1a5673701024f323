"""The job: arguments → config → tokenizer → data → model → train → export.

    deepspeed --num_gpus 8 -m zero_sft.train --model_name_or_path ... --data_path ...

Every rank runs `main`. What is cheap and may be wrong comes first, so that bad input is found before the weights are read;
every such stage ends in an agreement, so that all ranks leave with the same error, said once by rank 0. Training itself is
TRL's `SFTTrainer` on the Hugging Face Trainer and DeepSpeed.

What imports torch is imported in the functions, so that `--help` answers at once.
"""

import copy
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.arguments import Parsed, answer_help, parse, wants_help
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.rank_main import run_rank
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.console.log import close_console, open_console, quieten_transformers
from zero_sft.errors import ArgumentError, DistributedError
from zero_sft.launcher import launch_note

if TYPE_CHECKING:
    from zero_sft.job.inputs import Inputs
    from zero_sft.job.timeline import Timeline

logger = logging.getLogger("zero_sft.train")  # by name, since the module runs as __main__

LOGS = "logs"
"""The folder inside the output folder with what is known about the run."""

ANSWER_TOKENS = 256
"""Tokens of an answer to a sample prompt at most: enough for most answers to end."""

_ROUTING = ("output_router_logits", "router_aux_loss_coef")
"""What TRL writes into the config of a mixture of experts while it trains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status. Every rank."""
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


def run(parsed: Parsed, world: World) -> None:
    """Fine-tune and export. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    from zero_sft.cluster.stages import require_identical
    from zero_sft.job.disk_room import require_room_for_run
    from zero_sft.job.inputs import read_inputs
    from zero_sft.job.timeline import Timeline
    from zero_sft.zero.process_group import connect

    if parsed.training.get("disable_tqdm"):
        open_console(world, bars=False)
    for note in (*parsed.notes, launch_note()):
        if note:
            logger.info(note)
    timeline = Timeline()
    timeline.end("imports")
    ranks = f"{world.world_size} rank{'s' * (world.world_size > 1)}"
    logger.info("starting %s", ranks)
    with failure.stage("joining the ranks"), progress.task("starting DeepSpeed"):
        world = connect(world)
    logger.info("%s on %s", ranks, _device())
    quieten_transformers(world)
    # Ranks that were started with different arguments would part ways in the middle of a collective.
    require_identical(world, "arguments", _shown(parsed))
    timeline.end("joining")
    failure.set_stage("preparing tokenizer and data")
    inputs = read_inputs(parsed, world)
    failure.set_log_folder(Path(parsed.training["output_dir"]) / LOGS)
    timeline.end("inputs")
    require_room_for_run(parsed, inputs.arguments, inputs, world)
    failure.set_stage("loading the model")
    model = _load(parsed, inputs.arguments, inputs, world)
    model.generation_config = inputs.generation
    timeline.end("load")
    _train_and_export(parsed, inputs.arguments, model, inputs, world, timeline)


def _device() -> str:
    """The kind of device that DeepSpeed has chosen, for the log."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    kind = accelerator.device_name().partition(":")[0]
    return "CPU: DeepSpeed finds no GPU" if kind == "cpu" else f"{kind} ({accelerator.communication_backend_name()})"


def _load(parsed: Parsed, arguments: Any, inputs: "Inputs", world: World) -> Any:
    """The model, under the DeepSpeed config as the Trainer has completed it. Every rank; communicates."""
    from transformers import set_seed

    from zero_sft.loading.api import load_model_from

    set_seed(arguments.seed)
    logger.info("loading the model")
    return load_model_from(
        inputs.source,
        world,
        ds_config=arguments.hf_deepspeed_config.config,
        config=inputs.config,
        options=parsed.model.load_options(),
    )


def _train_and_export(parsed: Parsed, arguments: Any, model: Any, inputs: "Inputs", world: World, timeline: "Timeline") -> None:
    from transformers.trainer_utils import set_seed

    from zero_sft.cluster.stages import collective_stage
    from zero_sft.saving.rescue import export_or_rescue
    from zero_sft.zero import gather_hooks as gather

    report = model.load_report
    failure.set_stage("answering prompts")
    before = []
    if inputs.prompts:
        with gather.summon_full_params(model):
            before = _answers(model, inputs)
        timeline.end("answers before")
    set_seed(arguments.seed)
    trainer = _trainer(arguments, model, parsed, inputs, timeline)
    output = Path(arguments.output_dir)
    _begin(output, inputs, world)
    failure.set_stage(lambda: f"training, in step {trainer.state.global_step + 1} of {trainer.state.max_steps}")
    late_error = trainer.train_to_the_end(inputs.checkpoint and inputs.checkpoint.folder)
    logger.info("writing the model to %s", output)
    failure.set_stage("writing the model")
    export_or_rescue(trainer.export, output, world)  # before anything else that may fail
    failure.set_stage("answering prompts")
    after = _answers_of_engine(trainer, inputs)
    answers = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(inputs.prompts, before, after, strict=True)]
    known = {
        "arguments": _shown(parsed),
        "history": trainer.state.log_history,
        "load_report": report.to_dict(),
        "timeline": timeline.seconds,
        "answers": answers,
    }
    with collective_stage(world, "writing the logs"):
        if world.is_main:
            try:
                _write_logs(output, known)
            except Exception as error:  # noqa: BLE001 - the model is there, and the run must not end as if it were not
                logger.warning("the logs could not be written to %s: %s. The model is complete.", output / LOGS, error)
            best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
            _say_results(output, trainer.state, answers, best and Path(best).name)
    with collective_stage(world, "ending the training"):
        if late_error is not None:
            raise DistributedError(
                f"after the last step: {type(late_error).__name__}: {late_error}. The model as the last step left it is "
                f"complete in {output}.",
                code="cluster.failed_after_last_step",
            ) from late_error
    trained: Any = trainer.model_wrapped
    trained.destroy()  # DeepSpeed's threads end now, and not in the middle of the interpreter's exit


def _begin(output: Path, inputs: "Inputs", world: World) -> None:
    """Say what is resumed, and remove the former run's checkpoints where it is to be overwritten. Every rank; communicates."""
    from zero_sft.cluster.stages import collective_stage
    from zero_sft.saving.folder import explained
    from zero_sft.saving.former_run import remove_checkpoints

    with collective_stage(world, "removing the former run's checkpoints"), explained(output):
        if world.is_main and inputs.overwrites:
            remove_checkpoints(output)
    if inputs.checkpoint is not None:
        logger.info("starting the engine, with the checkpoint %s, which is whole", inputs.checkpoint.folder)
    else:
        logger.info("starting the engine")


def _trainer(arguments: Any, model: Any, parsed: Parsed, inputs: "Inputs", timeline: "Timeline") -> Any:
    from zero_sft.config import text_config
    from zero_sft.job.checkpoints import PublishedModel
    from zero_sft.job.steps import StepLog
    from zero_sft.job.timeline import trainer_callback
    from zero_sft.job.trainer import LogLastStep, Trainer, collator_for

    text = text_config(model.config)
    routing = {name: getattr(text, name) for name in _ROUTING if hasattr(text, name)}
    published = PublishedModel(tokenizer=_with_trained_template(inputs), config_values=routing, record=inputs.record)
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            published=published,
            train_dataset=inputs.training_data.rows,
            eval_dataset=inputs.evaluation_data.rows if inputs.evaluation_data else None,
            processing_class=inputs.tokenizer,
            data_collator=collator_for(model, inputs.tokenizer, arguments.pad_to_multiple_of),
            callbacks=[trainer_callback(timeline, logger.info), LogLastStep()],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # the same on every rank: it is about the arguments
        raise ArgumentError(f"the trainer refuses these arguments: {error}", code="arguments.trainer_refuses") from error
    rows = "packed rows" if inputs.training_data.is_packed else "samples"
    log = StepLog(lambda: trainer.tokens, rows)
    trainer.add_callback(log)
    log.wait_for_engine()
    return trainer


def _with_trained_template(inputs: "Inputs") -> Any:
    """A copy of the tokenizer with the chat template that is trained, as checkpoints and the export hold it."""
    published = copy.deepcopy(inputs.tokenizer)
    published.chat_template = inputs.template.jinja(inputs.tokenizer)
    return published


def _answers(model: Any, inputs: "Inputs") -> list[str]:
    from zero_sft.job.generation import answer

    count = len(inputs.prompts)
    logger.info("answering %d prompt%s", count, "s" * (count != 1))
    with progress.task("answering prompts"):
        return answer(model, inputs.tokenizer, inputs.prompts, template=inputs.template, max_new_tokens=ANSWER_TOKENS)


def _answers_of_engine(trainer: Any, inputs: "Inputs") -> list[str]:
    """After the training: a small model is gathered once for all tokens, a large one module by module for each."""
    if not inputs.prompts:
        return []
    from trl.models.utils import unwrap_model_for_generation

    from zero_sft.zero import gather_hooks as gather

    whole = gather.is_small(trainer.model)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=whole) as model:
        return _answers(model, inputs)


def _write_logs(output: Path, known: Mapping[str, Any]) -> None:
    """What is known about the run, a JSON file each, and the loss curve. Rank 0."""
    from zero_sft.job.loss_plot import plot_loss

    logs = output / LOGS
    logs.mkdir(exist_ok=True)
    for name, content in known.items():
        (logs / f"{name}.json").unlink(missing_ok=True)  # a former run's
        if content:
            text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
            (logs / f"{name}.json").write_text(text, encoding="utf-8")
    plot_loss(known["history"], logs / "loss.png", f"Loss of {Path(known['arguments']['model_name_or_path']).name}, {output}")


def _say_results(output: Path, state: Any, answers: list, best: str | None) -> None:
    history = state.log_history
    for each in answers:
        logger.info("prompt: %s\nbefore: %s\nafter:  %s", each["prompt"], each["before"], each["after"])
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if len(losses) > 1:
        (first, before), (last, after) = losses[0], losses[-1]
        change = f" ({100 * (after / before - 1):+.1f} %)" if math.isfinite(before) and math.isfinite(after) else ""
        when = f"after step {first}" if first else "before training"
        logger.info("loss on held-out samples: %.3f %s, %.3f after step %d%s", before, when, after, last, change)
    if best:
        logger.info("the exported model is that of %s, the best of the run (--load_best_model_at_end)", best)
    curve = output / LOGS / "loss.png"
    drawn = curve if curve.exists() else "none: no loss was logged (see --logging_steps)"
    logger.info("model:      %s\nloss curve: %s\nlogs:       %s", output, drawn, output / LOGS)


def _shown(parsed: Parsed) -> dict[str, Any]:
    """The arguments as they can be compared and shown: without the token."""
    model = {key: value for key, value in dataclasses.asdict(parsed.model).items() if key != "token"}
    return {**model, **dataclasses.asdict(parsed.data), **parsed.training}


if __name__ == "__main__":
    status = main()
    if status:
        from zero_sft.cluster.launcher_watch import leave

        leave(status)  # the interpreter's own way out may wait for ranks that are gone
    sys.exit(status)
