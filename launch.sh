#!/usr/bin/env bash
#SBATCH --job-name=zero_sft
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Start the training job on one machine with DeepSpeed's launcher, or on a SLURM cluster with one task per GPU.
# DeepSpeed's SLURM launcher is not used: it ignores --module and passes neither the ranks nor the master's address.

if [ -z "${BASH_VERSION:-}" ]; then
  echo "launch.sh: this script needs bash: start it as ./launch.sh or bash launch.sh [launcher.not_bash]" >&2
  exit 2
fi
was_signalled= # the signal that ends the run
trap 'was_signalled=USR1' USR1 # SLURM may signal a job before its ranks are there
set -euo pipefail
shopt -s extglob

usage() {
  cat <<'END'
Usage:
  ./launch.sh [launcher options] [--] [arguments of the job]
      On this machine: on all NVIDIA GPUs, or on 2 CPU ranks if there is no GPU.
      Launcher options are those of `deepspeed` and come first: --num_gpus N, --include, --hostfile, ...
      --max_restarts N starts the ranks again after a fault, at most N times, from the newest complete checkpoint. It stops
      where the run has ended twice in the same step, or three times without a new checkpoint.
      Without --master_port the script chooses a free port. `--` ends the launcher options; it is needed only if the first
      argument of the job has the name of a launcher option.

  sbatch [sbatch options] launch.sh [arguments of the job]
      On a SLURM cluster, with one rank per GPU. The defaults are one node, 8 GPUs, 64 CPUs and one day. Override them
      before the name of the script: sbatch --nodes=4 --gpus-per-node=4 --cpus-per-task=32 --time=2:00:00 launch.sh ...
      --cpus-per-task is the number of CPUs on each node, which the ranks share.
      A job that stays pending with the reason PartitionTimeLimit needs a smaller --time.
      Five minutes before its time is over the job saves a checkpoint, queues itself again, and goes on from there.
      Without GPUs: sbatch --gpus-per-node=0 --ntasks-per-node=<ranks> --cpus-per-task=<CPUs per rank> launch.sh ...

  ./launch.sh [arguments of the job]
      The same inside an allocation made by salloc. Two runs at the same time in one allocation need different --master_port.

  ./launch.sh --preflight ...
      Check the nodes for the job with these arguments, in seconds: versions, files, folders, memory, network.

  ./launch.sh --dry_run ...
      Show what would be started, and where, and start nothing.

  ./launch.sh -- --help
      Show the arguments of the job.

Environment:
  ZERO_SFT_PYTHON      the interpreter (default: .venv/bin/python of the project, else `python` on PATH)
  ZERO_SFT_MODULE      the module to run (default: zero_sft.train)
  ZERO_SFT_CPU_RANKS   the number of ranks on a machine without a GPU (default: 2)
  CONTAINER            words before each command that runs the interpreter, such as "apptainer exec --nv image.sif"; the
                       interpreter is then `python` in the container, if ZERO_SFT_PYTHON is not set
  MAX_REQUEUES         how often a SLURM job may be queued again (default: 20)
  OMP_NUM_THREADS      threads per rank (default: the CPUs of the node, divided among its ranks)
END
}

# The options of `deepspeed` that may come before the job's arguments: all except --module, which this script sets,
# --no_python, which contradicts it, and --log_level, which is also an option of the job and is left to the job.
readonly OPTIONS_WITH_VALUE=" -H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators
 --master_port --master_addr --node_rank --launcher --launcher_args --enable_each_rank_log --autotuning --bind_core_list
 --ssh_port --venv_script "
readonly OPTIONS_WITHOUT_VALUE=" --no_local_rank --no_ssh --no_ssh_check --force_multi --save_pid --bind_cores_to_rank
 -q --quiet "

# Options of sbatch that the job has no options like.
readonly OPTIONS_OF_SBATCH=" --time --nodes --ntasks-per-node --cpus-per-task --gpus-per-node --gres --partition --account --qos
 --mem --signal --requeue --no-requeue --dependency --array --exclusive --constraint "

launcher_options=() # as they were written
max_restarts=0
dry_run=
container=()     # words before each command
was_passed_on= # non-empty when the ranks of SLURM have got it
job_arguments=()
declare -A given_options=() # long name of a launcher option -> its value

die() { # CODE MESSAGE...
  echo "launch.sh: ${*:2} [launcher.$1]" >&2
  exit 2
}

note() { echo "launch.sh: $*" >&2; }

is_one_of() { [[ -n $1 && $2 =~ [[:space:]]"$1"[[:space:]] ]]; } # NAME LIST

long_name() {
  case $1 in
    -H) echo --hostfile ;;
    -i) echo --include ;;
    -e) echo --exclude ;;
    --num_accelerators) echo --num_gpus ;;
    *) echo "$1" ;;
  esac
}

# The launcher logs its command line, so it must not hold a token: a word in a token's form, or the value of an option for
# tokens unless that value is a boolean.
refuse_tokens() {
  local argument value previous=
  for argument in "$@"; do
    value=$argument
    if [[ $argument == --*=* ]]; then
      previous=${argument%%=*}
      value=${argument#*=}
    fi
    if [[ $value =~ ^hf_[A-Za-z0-9]{20,}$ ]] ||
      [[ $previous =~ ^--(push_to_)?(hub[_-])?(token|use[_-]auth[_-]token)$ && $value != --* && ! ${value,,} =~ ^(true|false)$ ]]; then
      die secret_on_command_line "the launcher would log the token on this command line: export HF_TOKEN instead"
    fi
    previous=$argument
  done
}

# Fill launcher_options, given_options and job_arguments. The launcher's options end at the first word that is not one.
split_arguments() {
  local name argument
  while (($#)); do
    name=${1%%=*}
    if [[ $1 == --dry_run ]]; then
      dry_run=1
    elif [[ $1 == --preflight ]]; then
      module=zero_sft.preflight
    elif [[ $name == --max_restarts ]]; then
      if [[ $1 == *=* ]]; then
        max_restarts=${1#*=}
      else
        (($# > 1)) || die value_missing "$1 needs a value"
        max_restarts=$2
        shift
      fi
      [[ $max_restarts =~ ^[0-9]{1,4}$ ]] || die bad_max_restarts "--max_restarts $max_restarts is not a number"
      max_restarts=$((10#$max_restarts))
    elif is_one_of "$name" "$OPTIONS_WITHOUT_VALUE"; then
      launcher_options+=("$1")
      given_options[$name]=true
    elif is_one_of "$name" "$OPTIONS_WITH_VALUE"; then
      if [[ $1 == *=* ]]; then
        launcher_options+=("$1")
        given_options[$(long_name "$name")]=${1#*=}
      else
        (($# > 1)) || die value_missing "$1 needs a value"
        launcher_options+=("$1" "$2")
        given_options[$(long_name "$name")]=$2
        shift
      fi
    else
      break
    fi
    shift
  done
  refuse_tokens "$@"
  case ${1:-} in
    --module | -m | --no_python)
      die option_of_the_script "$1 is set by this script: set ZERO_SFT_MODULE to run another module"
      ;;
    --) shift ;;
    *)
      for argument in "$@"; do
        # A launcher option after the job's arguments would reach the job, which does not know it.
        name=${argument%%=*}
        if [[ $name == --* ]] && is_one_of "$name" " --dry_run --preflight --max_restarts $OPTIONS_WITH_VALUE$OPTIONS_WITHOUT_VALUE"; then
          die option_misplaced "$name is an option of the launcher: put it before the arguments of the job"
        elif is_one_of "$name" "$OPTIONS_OF_SBATCH"; then
          die option_of_sbatch "$name is an option of sbatch: put it before launch.sh"
        fi
      done
      ;;
  esac
  job_arguments=("$@")
}

# The job as SLURM's commands take it. The last task of an array has the array's own number as SLURM_JOB_ID.
job_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} && -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Set project to the folder that holds the package, or to an empty string if the package must be installed. SLURM runs a
# copy of this script from its spool folder, which is not the project's folder; SLURM knows the path of the original.
find_project() {
  local folder script_folder submitted=
  script_folder=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
  if [[ -n ${SLURM_JOB_ID:-} && ! -f $script_folder/zero_sft/__init__.py ]]; then
    submitted=$(scontrol show job "$(job_id)" | sed -n 's|^ *Command=||p' | sed -n 1p)
    # The path of the script and its arguments, which all may hold spaces.
    while [[ $submitted == *" "* && ! -f $submitted ]]; do submitted=${submitted% *}; done
    submitted=$(dirname "$(readlink -f "$submitted")")
  fi
  for folder in "$script_folder" "$submitted" "${SLURM_SUBMIT_DIR:-}"; do
    if [[ -n $folder && -f $folder/zero_sft/__init__.py ]]; then
      project=$folder
      export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} # the ranks start in the caller's folder
      return
    fi
  done
  project=
}

find_python() {
  [[ ${CONTAINER:-} != *[$'\n\'"']* ]] ||
    die container_quoted "CONTAINER can't have quotes or several lines, since its words are split at spaces: put the command" \
      "into a script, and name that"
  read -r -a container <<<"${CONTAINER:-}"
  if ((${#container[@]})); then
    command -v "${container[0]}" >/dev/null || die no_container "CONTAINER: ${container[0]} is not an executable"
    python=${ZERO_SFT_PYTHON:-python}
    return
  elif [[ -n ${ZERO_SFT_PYTHON:-} ]]; then
    python=$(command -v "$ZERO_SFT_PYTHON") || die no_such_python "ZERO_SFT_PYTHON=$ZERO_SFT_PYTHON is not an executable"
  elif [[ -n $project && -x $project/.venv/bin/python ]]; then
    python=$project/.venv/bin/python
  else
    python=$(command -v python || command -v python3) ||
      die no_python "no python on PATH: activate an environment, or set ZERO_SFT_PYTHON"
  fi
  [[ -n $project ]] || "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("zero_sft"))' ||
    die no_package "$python has no zero_sft, and this script is not in its project: make a link to launch.sh instead of a copy," \
      "or set ZERO_SFT_PYTHON to an environment in which the package is installed"
  # DeepSpeed compiles its operators with the first ninja on PATH; a different version would compile them again.
  PATH=$(dirname "$python"):$PATH
  export PATH
}

# --- One machine -----------------------------------------------------------------------------------------------------

# Print the number of GPUs that DeepSpeed will see.
count_gpus() {
  local count=0 visible
  if [[ ${DS_ACCELERATOR:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || count=0
  fi
  if ((count > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    count=${#visible[@]}
    [[ ${visible[0]:-} != -* ]] || count=0 # CUDA shows the GPUs before the first invalid number: "-1" hides all
  fi
  echo "$count"
}

at_least_one() { echo $(($1 > 0 ? $1 : 1)); }

free_port() {
  "${container[@]}" "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

run_here() {
  local deepspeed ranks
  deepspeed=$(dirname "$python")/deepspeed # from the interpreter's environment
  ((${#container[@]} == 0)) || [[ $python == */* ]] || deepspeed=deepspeed
  ((${#container[@]})) || [[ -x $deepspeed ]] || deepspeed=$(command -v deepspeed) ||
    die no_deepspeed_command "no deepspeed command next to $python: run 'make setup' in the project, or set ZERO_SFT_PYTHON"

  ranks=$(count_gpus)
  [[ -z ${given_options[--hostfile]+set} || -r ${given_options[--hostfile]} ]] ||
    die no_hostfile "--hostfile ${given_options[--hostfile]}: no such file, or not readable"
  [[ ! ${given_options[--master_port]:-1} =~ ^[0-9]{1,5}$ ]] || ((10#${given_options[--master_port]:-1} < 65536)) ||
    die bad_port "--master_port ${given_options[--master_port]}: a port is a number below 65536"
  if [[ -n ${given_options[--hostfile]:-}${given_options[--num_nodes]:-} || -e /job/hostfile ]]; then
    ranks= # several machines: the hostfile sets the number
  elif [[ -n ${given_options[--include]:-} ]]; then
    ranks=${given_options[--include]//[^,]/}
    ranks=$((${#ranks} + 1))
  elif [[ -n ${given_options[--num_gpus]:-} ]]; then
    ranks=${given_options[--num_gpus]}
  elif ((ranks == 0)); then
    ranks=${ZERO_SFT_CPU_RANKS:-2}
    [[ $ranks =~ ^[1-9][0-9]{0,4}$ ]] || die bad_cpu_ranks "ZERO_SFT_CPU_RANKS=$ranks is not a positive integer"
    note "no GPU found: starting $ranks CPU ranks"
    [[ -z ${given_options[--exclude]:-} ]] || die nothing_to_exclude "--exclude: this machine has no GPU to leave out"
    launcher_options+=(--num_gpus "$ranks")
    # Keep hidden GPUs hidden: the launcher overwrites CUDA_VISIBLE_DEVICES for its ranks, with 0,1 for two ranks.
    [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  fi
  # By default every rank would start one thread per core of the machine.
  [[ ! $ranks =~ ^[1-9][0-9]*$ ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(at_least_one $(($(nproc) / ranks)))}
  [[ -n $ranks ]] || require_words_for_other_machines "$deepspeed"
  with_restarts start_here
}

start_here() {
  local options=("${launcher_options[@]}")
  [[ -n ${given_options[--master_port]:-} ]] || options+=(--master_port "$(free_port)")
  run_and_wait "${container[@]}" "$deepspeed" "${options[@]}" --module "$module" "${job_arguments[@]}"
}

# Print a command so that a shell would read it as it is.
show() { # COMMAND...
  local words
  printf -v words ' %q' "$@"
  echo "launch.sh: would start:$words"
}

# Start the ranks, and start them again after a fault, if --max_restarts allows it. Exit with the status of the last start.
with_restarts() { # FUNCTION
  local status
  if [[ -n $dry_run ]]; then
    "$1"
    exit 0
  fi
  if ((max_restarts > 0)); then
    ZERO_SFT_RESTART_FOLDER=$(mktemp -d) || # here rank 0 writes how far it has come
      die no_temporary_folder "--max_restarts needs a temporary folder: set TMPDIR to one that you may write to"
    export ZERO_SFT_RESTART_FOLDER
    trap 'rm -rf "$ZERO_SFT_RESTART_FOLDER"' EXIT
  fi
  for ((ZERO_SFT_START = 1; ; ZERO_SFT_START++)); do
    ((max_restarts == 0)) || export ZERO_SFT_START
    status=138 # ended by SIGUSR1
    if [[ -z $was_signalled ]]; then
      status=0
      "$1" || status=$?
    fi
    # 75: the run has ended early, as it was asked to.
    [[ $was_signalled != USR1 ]] || ((status == 0)) || requeue "$status"
    if ((max_restarts == 0 || status == 0 || status == 75)) || [[ -n $was_signalled ]]; then
      exit "$status"
    fi
    "${container[@]}" "$python" -m zero_sft.cluster.restarts \
      "$ZERO_SFT_RESTART_FOLDER" "$ZERO_SFT_START" "$status" "$max_restarts" ||
      exit "$status"
  done
}

# With pdsh, a shell on each machine parses the words again. Only the shim of `python -m zero_sft.launcher enable` quotes them.
require_words_for_other_machines() { # COMMAND
  local word
  ! grep -qs 'zero_sft launcher shim' "$1" || return 0
  for word in "${job_arguments[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ && $word != *%[hnu%]* ]] ||
      die argument_a_shell_changes "a shell on the other machines would change the argument '$word': put it into a YAML" \
        "file of arguments, or run 'python -m zero_sft.launcher enable' once"
  done
}

# Run a command and return its status. DeepSpeed's launcher does not forward signals; its child ends the ranks one after
# the other, and kills each after 30 seconds. On a signal this script therefore sends SIGTERM or SIGUSR1 to all ranks, which
# save a checkpoint and end, and continues to wait for the launcher.
run_and_wait() { # COMMAND...
  local parent status="" signal failure in out result
  if [[ -n $dry_run ]]; then
    show "$@"
    return
  fi
  export ZERO_SFT_LAUNCHER_PID=$$ # the ranks end with this process
  # In a separate session, the launcher gets no Ctrl-C of the terminal, and no signal that `timeout` sends to all of a group.
  # Its status comes through a pipe: bash 5.2 loses the status of a process that ends while `wait` handles a signal.
  exec {in}<&0 {out}>&1
  # shellcheck disable=SC2016
  exec {result}< <(exec setsid bash -c 'status=0; "${@:3}" <&"$1" >&"$2" || status=$?; echo "$status"' launch.sh "$in" "$out" "$@")
  parent=$!
  for signal in TERM INT HUP; do
    # shellcheck disable=SC2064
    trap "was_signalled=$signal; signal_ranks TERM $parent" "$signal"
  done
  # shellcheck disable=SC2064
  trap "was_signalled=USR1; signal_ranks USR1 $parent" USR1
  while [[ -z $status ]]; do # a signal interrupts `read`
    failure=0
    read -r -u "$result" status || failure=$?
    ((failure == 0 || failure > 128)) || status=137 # the parent of the launcher was killed
  done
  exec {in}<&- {out}>&- {result}<&-
  ((status <= 192)) || status=$((384 - status)) # DeepSpeed's launcher ends with minus the signal that ended a rank
  return "$status"
}

# Send a signal to the ranks that a launcher has started on this machine. Before there are any, or if all are on other
# machines, end the launcher's children.
signal_ranks() { # SIGNAL PID_OF_THE_LAUNCHER'S_PARENT
  local launcher children=() targets=()
  children_of "$2" children
  launcher=${children[0]:-$2}
  if [[ $(cat "/proc/$launcher/comm" 2>/dev/null) == srun ]]; then
    # srun passes SIGUSR1 on to the ranks, and ends them on SIGTERM.
    if [[ -z $was_passed_on ]]; then
      was_passed_on=1
      kill -USR1 "$launcher" 2>/dev/null || true
    elif [[ $1 != USR1 ]]; then # SLURM may announce the end more than once
      kill -TERM "$launcher" 2>/dev/null || true
    fi
    return 0 # in a trap, a plain `return` would give the status of the interrupted command
  fi
  find_ranks "$launcher"
  children_of "$launcher" children
  if ((${#targets[@]})); then
    kill "-$1" "${targets[@]}" 2>/dev/null || true
  else
    kill -TERM "${children[@]:-$launcher}" 2>/dev/null || true
  fi
}

# Add the ranks below a process to targets; the ranks' own children are left out.
find_ranks() { # PID
  local below=() child
  children_of "$1" below
  for child in "${below[@]}"; do
    # The launcher's child gives this variable to the ranks alone.
    if grep -qsz '^CROSS_RANK=' "/proc/$child/environ"; then
      targets+=("$child")
    else
      find_ranks "$child"
    fi
  done
}

children_of() { # PID NAME_OF_ARRAY
  read -r -a "$2" 2>/dev/null <"/proc/$1/task/$1/children" || true
}

# --- SLURM -----------------------------------------------------------------------------------------------------------

# True in a batch script and in the shell of salloc, false inside a step. Some clusters open the shell of salloc on the first
# node: that shell is a step with a reserved number at the top of the 32-bit range, and may start steps itself.
in_allocation() {
  [[ -n ${SLURM_JOB_ID:-} ]] && { [[ ! ${SLURM_STEP_ID:-} =~ ^[0-9]+$ ]] || ((SLURM_STEP_ID >= 0xfffffff0)); }
}

# Print the number of GPUs on each node of the job; more than one line if the nodes differ. scontrol is asked, since SLURM's
# variables depend on how the GPUs were requested and are missing in the shell of salloc. A line of its output:
# "Nodes=node[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:a100:8(IDX:0-7),shard:2(IDX:0)".
slurm_gpus_per_node() {
  scontrol show job -d "$(job_id)" | awk '
    /^ *Nodes=/ {
      sub(/.* GRES=/, ""); gsub(/\([^)]*\)/, "")
      gpus = 0
      for (i = split($0, items, ","); i > 0; i--)
        if (items[i] ~ /^gpu:/) { last = split(items[i], words, ":"); gpus += words[last] }
      print gpus
    }' | sort -u
}

# Print the distinct numbers of one of SLURM's lists, the smallest first: "64(x2),32" -> 32 and 64.
slurm_numbers() { tr ',' '\n' <<<"${1//\(*([^)])\)/}" | sort -nu; }

# Set the job's layout: nodes, gpus and ranks (per node), cpus (per rank). There is one rank per GPU, whatever number of tasks
# was requested; without GPUs there is one rank per task.
plan_step() {
  local tasks
  nodes=$SLURM_JOB_NUM_NODES
  tasks=$(slurm_numbers "${SLURM_TASKS_PER_NODE:-1}")
  gpus=$(slurm_gpus_per_node)
  : "${gpus:=${SLURM_GPUS_ON_NODE:-0}}"
  [[ $gpus =~ ^[0-9]+$ ]] ||
    die gpus_of_nodes_differ "the nodes of the job have different numbers of GPUs (${gpus//$'\n'/, }): request the same" \
      "number on every node with --gpus-per-node"
  ranks=$gpus
  if ((gpus == 0)); then
    [[ $tasks =~ ^[0-9]+$ ]] ||
      die tasks_of_nodes_differ "the nodes of the job have different numbers of tasks (${tasks//$'\n'/, }): request the" \
        "same number on every node with --ntasks-per-node"
    ranks=$tasks
  elif [[ $tasks != "$gpus" && $tasks != 1 ]]; then
    note "tasks per node: ${tasks//$'\n'/ or }, GPUs per node: $gpus; starting one rank per GPU"
  fi
  cpus=$(slurm_numbers "$SLURM_JOB_CPUS_PER_NODE" | sed -n 1p)
  ((cpus >= ranks)) ||
    die too_few_cpus "each node of the job has fewer CPUs ($cpus) than ranks ($ranks): submit with" \
      "--cpus-per-task=<CPUs of a node>"
  cpus=$((cpus / ranks))
}

# True in a script that sbatch has started, which can be queued again.
in_batch_script() { [[ ${ENVIRONMENT:-} == BATCH ]]; }

# Count the starts in a row that were signalled before they had trained. The job's comment keeps the number, since a job that is
# queued again begins with its first environment; without a comment for it, three such starts of all are too many.
count_starts_without_training() { # STATUS
  local comment number
  comment=$(scontrol show job "$(job_id)" | sed -n 's|^ *Comment=||p' | sed -n 1p) || comment=
  number=$((${comment//[!0-9]/} + 0))
  [[ $comment == "$COMMENT"* ]] || number=0
  if (($1 == 75)); then
    starts_without_training=0
  elif [[ -z $comment || $comment == "$COMMENT"* ]]; then
    starts_without_training=$((number + 1))
  else
    starts_without_training=$((${SLURM_RESTART_COUNT:-0} + 1))
    return
  fi
  ((starts_without_training == number)) ||
    scontrol update "JobId=$(job_id)" "Comment=$COMMENT$starts_without_training" 2>/dev/null || true
}
readonly COMMENT="starts without training: "

# Let SLURM start this job again after its signal, if that is allowed. It ends the job, and this script with it.
requeue() { # STATUS
  local count=$((${SLURM_RESTART_COUNT:-0} + 1)) starts_without_training=0 printed
  in_batch_script && [[ $module != zero_sft.preflight ]] || return 0
  count_starts_without_training "$1"
  if ((starts_without_training > 3 || (starts_without_training > 0 && count > max_requeues))); then
    note "the job was signalled $starts_without_training times before it had trained: its --time must be longer than its start" \
      "and the time of --signal"
  elif ((count > max_requeues)); then
    note "the job has been queued again $max_requeues times (MAX_REQUEUES); submit it once more with" \
      "--resume_from_checkpoint auto"
  elif printed=$(scontrol requeue "$(job_id)" 2>&1); then
    note "queued again, $count of at most $max_requeues times: the job" \
      "$( (($1 == 75)) && echo 'goes on from its newest checkpoint' || echo 'starts again')"
    sleep 60 # SLURM ends this script
  else
    note "SLURM does not queue the job again ($printed); submit it once more with --resume_from_checkpoint auto"
  fi
}

# Print a free port of this machine: START, or one far from those with which the next jobs begin.
free_port_from() { # START
  "${container[@]}" "$python" -c '
import random, socket, sys
for port in [int(sys.argv[1]), *random.sample(range(32000, 32768), 100)]:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            continue
        print(port)
        break' "$1"
}

run_in_slurm() {
  local nodes gpus ranks cpus option first_port max_requeues=${MAX_REQUEUES:-20} step=()
  for option in "${!given_options[@]}"; do
    [[ $option == --master_port || $option == --master_addr || $option == --enable_each_rank_log ]] ||
      die option_under_slurm "$option is for DeepSpeed's launcher on one machine; under SLURM give sbatch or salloc" \
        "--nodes and --gpus-per-node instead"
  done
  [[ -z ${SLURM_HET_SIZE:-} ]] ||
    die heterogeneous_job "this is a job of several components ($SLURM_HET_SIZE), whose nodes can't train together: submit one" \
      "with equal nodes"
  if [[ -z ${SLURM_JOB_NUM_NODES:-} || -z ${SLURM_JOB_NODELIST:-} || -z ${SLURM_JOB_CPUS_PER_NODE:-} ]] ||
    ! scontrol show job "$(job_id)" >/dev/null 2>&1; then
    die job_has_ended "SLURM_JOB_ID=$SLURM_JOB_ID is not a job that SLURM knows: the variable is left over from one that has" \
      "ended. Leave its shell, or: unset SLURM_JOB_ID"
  fi
  [[ $max_requeues =~ ^[0-9]{1,4}$ ]] || die bad_max_requeues "MAX_REQUEUES=$max_requeues is not a number"
  max_requeues=$((10#$max_requeues))
  [[ ${SLURM_RESTART_COUNT:=0} =~ ^[0-9]{1,6}$ ]] || SLURM_RESTART_COUNT=0
  if ((SLURM_RESTART_COUNT > 0)); then
    # After a failed node, SLURM queues the job again by itself.
    ((SLURM_RESTART_COUNT <= max_requeues)) ||
      die too_many_requeues "the job was queued again $SLURM_RESTART_COUNT times, more than MAX_REQUEUES=$max_requeues:" \
        "look for the cause in its log, then submit it once more with --resume_from_checkpoint auto"
    note "start $((SLURM_RESTART_COUNT + 1)) of job $SLURM_JOB_ID"
  fi
  plan_step
  MASTER_ADDR=${given_options[--master_addr]:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
  # Jobs that share a node have different ids, and the kernel gives client sockets only ports from 32768 upwards.
  first_port=$((20000 + SLURM_JOB_ID % 12000))
  MASTER_PORT=${given_options[--master_port]:-}
  if [[ -z $MASTER_PORT && ${SLURMD_NODENAME:-} == "$MASTER_ADDR" ]]; then
    MASTER_PORT=$(free_port_from "$first_port")
  fi
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$first_port} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

  step=(--nodes="$nodes" --ntasks=$((nodes * ranks)) --ntasks-per-node="$ranks" --cpus-per-task="$cpus" --export=ALL)
  # Every rank must see all GPUs of its node, and takes the one of its local rank. So drop the requests of the job that would
  # show each task only one GPU. With --gpu-bind=none instead, SLURM 22.05 does not set CUDA_VISIBLE_DEVICES at all.
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_GPU_BIND SLURM_GPUS_PER_NODE
  unset SLURM_GPUS
  ((gpus == 0)) || step+=(--gpus-per-node="$ranks")
  # A rank that fails, or that ends long before the others, would leave them waiting in a collective.
  step+=(--kill-on-bad-exit=1 --wait=600)
  if [[ -n ${given_options[--enable_each_rank_log]:-} ]]; then
    mkdir -p "${given_options[--enable_each_rank_log]}" ||
      die no_log_folder "--enable_each_rank_log ${given_options[--enable_each_rank_log]}: the folder can't be made"
    step+=(--output="${given_options[--enable_each_rank_log]}/job_%j_rank_%t.log")
  else
    step+=(--label)
  fi
  if [[ -n $dry_run ]]; then
    echo "launch.sh: $ranks ranks on each of these nodes: $(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
    echo "launch.sh: MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT OMP_NUM_THREADS=$OMP_NUM_THREADS"
  fi
  with_restarts start_in_slurm
}

# The shell of a task. Its rank numbers exist only inside the step: expanded in this script they would be 0 for every rank.
# SLURM signals all processes of a task, so that the shell only has to survive. Ranks that end early, as they were asked to,
# have status 75, and --kill-on-bad-exit would kill the others, which do the same: so only rank 0 has it, after the others.
# shellcheck disable=SC2016
readonly TASK='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$1
  trap : TERM USR1 HUP
  status=0
  "${@:2}" || status=$?
  if ((status == 75)); then
    ((RANK == 0)) || exit 0
    sleep 3
  fi
  exit "$status"'

start_in_slurm() {
  run_and_wait srun "${step[@]}" bash -c "$TASK" launch.sh "$ranks" \
    "${container[@]}" "$python" -u -m "$module" "${job_arguments[@]}"
}

# ---------------------------------------------------------------------------------------------------------------------

main() {
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    return
  fi
  module=${ZERO_SFT_MODULE:-zero_sft.train}
  split_arguments "$@"
  find_project
  find_python
  if in_allocation; then
    run_in_slurm
  fi
  [[ ! ${SLURM_STEP_NUM_TASKS:-1} =~ ^[0-9]+$ ]] || ((${SLURM_STEP_NUM_TASKS:-1} == 1)) ||
    die started_by_srun "don't start this script with srun: use sbatch, or run it directly inside salloc"
  run_here
}

main "$@"
