"""What the fork server imports before it forks a rank; imports only, no threads, no process groups."""

import multiprocessing.connection  # noqa: F401

import deepspeed
import deepspeed.runtime.zero.stage3  # noqa: F401
import transformers.modeling_utils
import transformers.models.auto.modeling_auto  # noqa: F401
