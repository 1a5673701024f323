"""The job: arguments → config → tokenizer → data → model → train → export.

    deepspeed --num_gpus 8 -m zero_sft.train --model_name_or_path ... --data_path ...

Every rank runs `main`. What is cheap and may be wrong comes first, so that bad input is found before the weights are read;
every such stage ends in an agreement, so that all ranks leave with the same error, said once by rank 0. Training itself is
TRL's `SFTTrainer` on the Hugging Face Trainer and DeepSpeed.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft import distributed
from zero_sft.arguments import Parsed, build_training_arguments, help_text, parse, wants_help
from zero_sft.cluster import failure
from zero_sft.cluster.job import run_rank
from zero_sft.cluster.watch import leave
from zero_sft.console import open_console, quieten_transformers
from zero_sft.distributed import agreed
from zero_sft.errors import ArgumentError
from zero_sft.inputs import Inputs, read_inputs
from zero_sft.launcher import launch_note
from zero_sft.timeline import Timeline, trainer_callback
from zero_sft.world import World

logger = logging.getLogger("zero_sft.train")  # by name, since the module runs as __main__

LOGS = "logs"
"""The folder inside the output folder with what is known about the run."""

ANSWER_TOKENS = 96

_ROUTING = ("output_router_logits", "router_aux_loss_coef")
"""What TRL writes into the config of a mixture of experts while it trains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status. Every rank."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        sys.stdout.write(help_text())
        return 0

    def job(world: World) -> None:
        open_console(world)
        run(parse(argv), world)

    return run_rank(job)


def run(parsed: Parsed, world: World) -> None:
    """Fine-tune and export. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    for note in (*parsed.notes, launch_note()):
        if note:
            logger.info(note)
    timeline = Timeline()
    timeline.end("imports")
    logger.info(
        "joining the ranks, %d; the first run on a machine compiles DeepSpeed's operators, a minute or (NVMe) three",
        world.world_size,
    )
    with failure.stage("joining the ranks"):
        world = distributed.connect(world)
    quieten_transformers(world)
    # Ranks that were started with different arguments would part ways in the middle of a collective.
    distributed.agree_on(world, "arguments", _shown(parsed))
    timeline.end("joining")
    failure.set_stage("preparing tokenizer and data")
    inputs = read_inputs(parsed, world)
    failure.set_log_folder(Path(parsed.training["output_dir"]) / LOGS)
    timeline.end("inputs")
    if _offloads_optimizer(inputs.ds_config) and parsed.training["optim"] == "adamw_torch":
        logger.info("the optimizer runs on the host: --optim adamw_torch_fused is several times as fast there")
    with agreed(world, "setting up the trainer's arguments"):
        arguments = build_training_arguments({**parsed.training, **inputs.sampling}, inputs.ds_config)
    failure.set_stage("loading the model")
    model = _load(parsed, arguments, inputs)
    timeline.end("load")
    _train_and_export(parsed, arguments, model, inputs, world, timeline)


def _load(parsed: Parsed, arguments: Any, inputs: Inputs) -> Any:
    """The model, under the DeepSpeed config as the Trainer has completed it. Every rank; communicates."""
    from transformers import set_seed

    from zero_sft.pretrained import load_model

    set_seed(arguments.seed)
    logger.info("loading the model")
    return load_model(
        parsed.model.model_name_or_path,
        ds_config=arguments.hf_deepspeed_config.config,
        config=inputs.config,
        dtype=parsed.model.dtype,
        attn_implementation=parsed.model.attn_implementation,
        loader=parsed.model.loader,
        strict=parsed.model.strict,
        verify=parsed.model.verify,
        ignore_mismatched_sizes=parsed.model.ignore_mismatched_sizes,
        buffer_mib=parsed.model.buffer_mib,
        mmap=parsed.model.mmap,
        **inputs.hub,
    )


def _train_and_export(parsed: Parsed, arguments: Any, model: Any, inputs: Inputs, world: World, timeline: Timeline) -> None:
    from transformers.trainer_utils import set_seed

    from zero_sft.config import text_config
    from zero_sft.saving.export import save_pretrained
    from zero_sft.zero import gather

    tokenizer, report = inputs.tokenizer, model.load_report
    failure.set_stage("answering prompts")
    before = []
    if inputs.prompts:
        with gather.whole_model(model):
            before = _answers(parsed, model, inputs)
        timeline.end("answers before")
    set_seed(arguments.seed)
    text = text_config(model.config)
    routing = {name: getattr(text, name) for name in _ROUTING if hasattr(text, name)}
    trainer = _trainer(arguments, model, inputs, timeline)
    resumed = arguments.resume_from_checkpoint
    logger.info("training%s", f", from the checkpoint that --resume_from_checkpoint {resumed} names" if resumed else "")
    failure.set_stage(lambda: f"training, in step {trainer.state.global_step + 1} of {trainer.state.max_steps}")
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    failure.set_stage("answering prompts")
    after = _answers_of_engine(parsed, trainer, inputs)
    output = Path(arguments.output_dir)
    logger.info("writing the model to %s", output)
    failure.set_stage("writing the model")
    text.update(routing)  # the trainer's loss had them set
    trained: Any = trainer.model_wrapped
    _set_chat_template(tokenizer, parsed)
    save_pretrained(trained, output, tokenizer=tokenizer)
    answers = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(inputs.prompts, before, after, strict=True)]
    with agreed(world, "writing the logs"):
        if world.is_main:
            known = {
                "arguments": _shown(parsed),
                "history": trainer.state.log_history,
                "load_report": report.to_dict(),
                "timeline": timeline.seconds,
                "answers": answers,
            }
            _write_logs(output, known)
            _say_results(output, trainer.state.log_history, answers)
    trained.destroy()  # DeepSpeed's threads end now, and not in the middle of the interpreter's exit


def _trainer(arguments: Any, model: Any, inputs: Inputs, timeline: Timeline) -> Any:
    from zero_sft.trainer import LastStepLogged, Trainer, collator_for

    try:
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=inputs.training_data.dataset,
            eval_dataset=inputs.evaluation_data.dataset if inputs.evaluation_data else None,
            processing_class=inputs.tokenizer,
            data_collator=collator_for(model, inputs.tokenizer, arguments.pad_to_multiple_of),
            callbacks=[trainer_callback(timeline, logger.info), LastStepLogged()],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # the same on every rank: it is about the arguments
        raise ArgumentError(f"the trainer refuses these arguments: {error}") from error


def _set_chat_template(tokenizer: Any, parsed: Parsed) -> None:
    """The format that was trained goes out with the model: without it, nobody could ask it anything as it has learnt to be."""
    from zero_sft.data.templates import choose_template

    tokenizer.chat_template = choose_template(parsed.data.chat_template, tokenizer).jinja(tokenizer)


def _answers(parsed: Parsed, model: Any, inputs: Inputs) -> list[str]:
    from zero_sft.samples import answer

    logger.info("answering %d prompts", len(inputs.prompts))
    template = parsed.data.chat_template
    return answer(model, inputs.tokenizer, inputs.prompts, chat_template=template, max_new_tokens=ANSWER_TOKENS)


def _answers_of_engine(parsed: Parsed, trainer: Any, inputs: Inputs) -> list[str]:
    """After the training: a small model is gathered once for all tokens, a large one module by module for each."""
    if not inputs.prompts:
        return []
    from trl.models.utils import unwrap_model_for_generation

    from zero_sft.zero import gather

    whole = gather.is_small(trainer.model)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=whole) as model:
        return _answers(parsed, model, inputs)


def _write_logs(output: Path, known: Mapping[str, Any]) -> None:
    """What is known about the run, a JSON file each, and the loss curve. Rank 0."""
    from zero_sft.curves import plot_loss

    logs = output / LOGS
    logs.mkdir(exist_ok=True)
    for name, content in known.items():
        if content:
            text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
            (logs / f"{name}.json").write_text(text, encoding="utf-8")
    plot_loss(known["history"], logs / "loss.png")


def _say_results(output: Path, history: list, answers: list) -> None:
    for each in answers:
        logger.info("prompt: %s\nbefore: %s\nafter:  %s", each["prompt"], each["before"], each["after"])
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if len(losses) > 1:
        (first, before), (last, after) = losses[0], losses[-1]
        change = 100 * (after / before - 1)
        when = f"after step {first}" if first else "before"
        logger.info("loss on held-out conversations: %.3f %s, %.3f after step %d (%+.0f %%)", before, when, after, last, change)
    curve = output / LOGS / "loss.png"
    drawn = curve if curve.exists() else "none: no loss was logged (see --logging_steps)"
    logger.info("model:      %s\nloss curve: %s\nlogs:       %s", output, drawn, output / LOGS)


def _offloads_optimizer(ds_config: Mapping[str, Any]) -> bool:
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _shown(parsed: Parsed) -> dict[str, Any]:
    """The arguments as they can be compared and shown: without the token."""
    model = {key: value for key, value in dataclasses.asdict(parsed.model).items() if key != "token"}
    return {**model, **dataclasses.asdict(parsed.data), **parsed.training}


if __name__ == "__main__":
    status = main()
    if status:
        leave(status)  # the interpreter's own way out may wait for ranks that are gone
    sys.exit(status)
