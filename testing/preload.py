"""Imports of the fork server before it forks ranks: no threads and no process groups may start here."""

import multiprocessing.connection  # noqa: F401

import deepspeed
import deepspeed.runtime.zero.stage3  # noqa: F401
import transformers.modeling_utils
import transformers.models.auto.modeling_auto  # noqa: F401
