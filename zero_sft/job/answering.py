"""Let the model answer the sample prompts now and then while it is trained. Importing this module imports transformers."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from zero_sft.saving.random_states import random_states, restore_random_states

if TYPE_CHECKING:
    from zero_sft.job.run_folder import RunFolder

logger = logging.getLogger("zero_sft.train")


class AnswerPrompts(TrainerCallback):
    """Answer the prompts after every N-th step. Every rank; communicates. The training goes on as it would without.

    Args:
        every: the number of steps between two rounds of answers; 0: there are none.
        answer: returns an answer for each prompt; called on every rank.
        run_folder: takes the answers; None on ranks other than 0.
    """

    def __init__(
        self, prompts: Sequence[str], every: int, answer: Callable[[], Sequence[str]], run_folder: "RunFolder | None"
    ) -> None:
        self._prompts, self._every, self._answer, self._run_folder = prompts, every, answer, run_folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer, unless the training ends here: then the answers come after it."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if not self._every or state.global_step % self._every or is_last:
            return
        states = random_states()
        answers = self._answer()
        restore_random_states(states)
        if self._run_folder is not None:
            for prompt, text in zip(self._prompts, answers, strict=True):
                logger.info("prompt: %s\nstep %d: %s", prompt, state.global_step, text)
            pairs = [{"prompt": prompt, "answer": text} for prompt, text in zip(self._prompts, answers, strict=True)]
            self._run_folder.add({"event": "answers", "step": state.global_step, "answers": pairs})
