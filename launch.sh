#!/usr/bin/env bash
# Usage: bash launch.sh [start|status|stop] [--name NAME] [--nproc-per-node N|auto] [-- OPTIONS...]
#
#   start   check the OPTIONS of train_llm.py, start it with torchrun in tmux, return (the default)
#   status  running, finished or failed, and the last step; exit status 0 unless it failed
#   stop    end the run and every process it started
#
#   --name NAME               names the run; --experiment-name among the OPTIONS does the same.
#                             Without a --model-name the built-in demo is trained, and NAME is demo
#   --nproc-per-node N|auto   processes; auto: one a GPU, or 2 where there is no GPU (default: auto)
#
# Environment: PYTHON (the interpreter; default: python on PATH), STOP_GRACE_SECONDS (30: how long
# stop waits before SIGKILL). All of the environment reaches the run. Paths among the OPTIONS are
# relative to the directory of launch.sh. Output goes to logs/NAME/HOST/, results to outputs/NAME/.

set -euo pipefail

# What `bash launch.sh` trains when no model is named; OPTIONS come after these, and the last wins.
demo_recipe=(
    --model-name demo/model --dataset-name demo/corpus.jsonl
    --seq-length 256 --batch-size 4 --global-batch-size 8 --max-steps 350
    --lr 5e-3 --warmup-steps 20 --log-freq 5
)

abort() { echo "launch.sh: $*" >&2; exit 1; }
refuse() { echo "launch.sh: $* (bash launch.sh -h tells the usage)" >&2; exit 2; }

# --- 1. What is asked -------------------------------------------------------------------
# Before `--` stand the launcher's own options, after it those of train_llm.py, passed on as they
# are. The launcher reads three of them (experiment, model, output folder) and changes none.

main() {
    verb=start name='' ranks='' options=()
    case ${1:-} in start | status | stop) verb=$1; shift ;; esac
    while (($#)); do
        case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
        case $1 in
            --) shift; options=("$@"); break ;;
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch.sh; exit 0 ;;
            --name | --nproc-per-node)
                [[ ${2:-} ]] || refuse "$1 needs a value"
                if [[ $1 == --name ]]; then name=$2; else ranks=$2; fi
                shift 2 ;;
            *) refuse "unknown option or verb '$1'; options of train_llm.py go after --" ;;
        esac
    done
    [[ $verb == start || ! $ranks${options[*]} ]] ||
        refuse "$verb takes --name alone; --nproc-per-node and options after -- belong to start"
    [[ ${ranks:=auto} =~ ^(auto|[1-9][0-9]*)$ ]] ||
        refuse "--nproc-per-node must be a number of processes or auto, not '$ranks'"
    choose_name
    read_hosts
    [[ $verb == start || -e $run_dir/run_id ]] ||
        abort "no run named $name was started here; started were:" "$(ls -m logs 2> /dev/null)"
    "$verb"
}

# option NAME: the value train_llm.py will see for --NAME (argparse takes both spellings, and the
# last one wins); fails if --NAME is not among the options.
option() {
    local i value='' found=1
    for ((i = 0; i < ${#options[@]}; i++)); do
        case ${options[i]} in
            "--$1") value=${options[i + 1]:-} found=0 ;;
            "--$1="*) value=${options[i]#*=} found=0 ;;
        esac
    done
    printf '%s' "$value"
    return "$found"
}

choose_name() {
    local experiment
    if experiment=$(option experiment-name); then
        [[ ! $name || $name == "$experiment" ]] ||
            refuse "--name $name and --experiment-name $experiment: a run has one name, give one"
        name=$experiment
    elif [[ ! $name ]]; then
        [[ $verb != start ]] || ! option model-name > /dev/null ||
            refuse "the run has no name: give --name NAME (it names logs/NAME and outputs/NAME)"
        name=demo
    fi
    # the name becomes part of paths and of a socket's name, which has room for about 107 bytes
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ ]] ||
        refuse "'$name' cannot name a run: use up to 64 letters, digits, dots, dashes, underscores"
}

# Logs are filed under the host as ./hosts spells it, not under its hostname: that file alone then
# tells where to look, and two machines that believe they have the same name stay apart.
read_hosts() {
    [[ -e hosts ]] || abort "there is no file ./hosts; write localhost in it"
    mapfile -t hosts < <(sed -E 's/#.*//; s/^\s+|\s+$//g; /^$/d' hosts)
    [[ ${hosts[*]} == localhost ]] ||
        abort "./hosts must name localhost alone (other hosts cannot be started yet); it names:" \
            "${hosts[*]:-nothing}"
    host=localhost
    run_dir=logs/$name/$host
}

# --- 2. Start ---------------------------------------------------------------------------
# A run must outlive this shell, and what it was told must arrive unchanged. So everything that can
# be wrong is asked first; then a generated script holds the command, and a tmux server of this run
# alone runs it (a server passes on the environment that its *first* session came with).

start() {
    command -v tmux > /dev/null || abort "tmux is needed: apt-get install tmux"
    mkdir -p logs
    exec {lock}> logs/.lock # one start at a time: a second one waits, then finds the name taken
    flock "$lock"
    # runs of this name in another folder are other runs: the socket's name tells them apart
    socket=train_llm-$name-$(cksum <<< "$PWD" | cut -d' ' -f1)
    if [[ $(processes) ]] || tmux -L "$socket" has-session 2> /dev/null; then
        abort "$name is already running; give another --name, or: bash launch.sh stop --name $name"
    fi

    find_python
    if ! option model-name > /dev/null; then
        "$PYTHON" download.py --demo || abort "download.py --demo failed; nothing was started"
        options=("${demo_recipe[@]}" "${options[@]}")
    fi
    options=(--experiment-name "$name" "${options[@]}")
    WORLD_SIZE=$ranks "$PYTHON" train_llm.py --check "${options[@]}" || {
        code=$?
        echo "launch.sh: options refused; nothing was started" >&2
        exit "$code"
    }

    mkdir -p "$run_dir"
    rm -f "$run_dir"/{exit_code,stopped}
    echo "$name-$(< /proc/sys/kernel/random/uuid)" > "$run_dir/run_id"
    option save-dir > "$run_dir/save_dir" || printf outputs > "$run_dir/save_dir"
    write_run_script > "$run_dir/run.sh"
    # -f /dev/null: the user's tmux.conf could keep panes or start other programs in them
    TRAIN_LLM_RUN_ID=$(< "$run_dir/run_id") \
        tmux -L "$socket" -f /dev/null new-session -d bash "$run_dir/run.sh" {lock}>&-
    tell_started
}

# Sets PYTHON (absolute), ranks, and the defaults of environment variables that depend on them.
find_python() {
    local answer gpus
    PYTHON=${PYTHON:-$(command -v python || command -v python3)} ||
        abort "no python on PATH: activate the environment, or set PYTHON=/path/to/python"
    answer=$("$PYTHON" - << 'EOF'
import importlib.util, sys
needed = ("torch", "transformers", "datasets", "huggingface_hub", "tqdm")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"launch.sh: {sys.executable} lacks {', '.join(missing)}")
import torch
print(torch.cuda.device_count(), sys.executable)
EOF
    ) || abort "$PYTHON cannot train; run: $PYTHON -m pip install -r requirements.txt"
    read -r gpus PYTHON <<< "$answer"

    [[ $ranks != auto ]] || ranks=$((gpus ? gpus : 2))
    if ((gpus)); then
        ((ranks <= gpus)) || refuse "--nproc-per-node $ranks is more than the $gpus GPUs of $host"
        # FSDP's buffers vary in size: less memory is lost between them
        [[ ${PYTORCH_CUDA_ALLOC_CONF:-} ]] ||
            export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    elif command -v nvidia-smi > /dev/null; then
        echo "launch.sh: nvidia-smi is here, but torch sees no GPU: training on the CPU" >&2
    fi
    # torchrun would set 1, which leaves cores idle: on the CPU, and in an offloaded AdamW
    local cores; cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    processors=$( ((gpus)) && echo GPU || echo CPU)
}

# The script that tmux runs. %q keeps every byte of an argument; each $ is doubled because torchrun
# reads ${local_rank} and $$ in arguments as macros (torch 2.13, elastic/utils/api.py).
write_run_script() {
    local torchrun=(
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks"
        --log-dir "$run_dir" --redirects 3 train_llm.py "${options[@]//\$/\$\$}"
    )
    cat << EOF
#!/usr/bin/env bash
# Written by launch.sh start and overwritten by the next one.
trap : HUP INT TERM # outlive torchrun, to write down how it ended
cd $(printf %q "$PWD") || exit
{
    echo "==== \$TRAIN_LLM_RUN_ID started \$(date --iso-8601=seconds)"
   $(printf ' %q' "${torchrun[@]}")
    code=\$?
    echo "==== \$TRAIN_LLM_RUN_ID ended \$(date --iso-8601=seconds) with exit code \$code"
} >> $run_dir/agent.log 2>&1
echo "\$code" > $run_dir/exit_code.part && mv $run_dir/exit_code.part $run_dir/exit_code
EOF
}

# Waits until torchrun has made the log files, because the command to follow them is useless before.
tell_started() {
    local deadline=$((SECONDS + 20))
    until [[ $(find "$run_dir" -newer "$run_dir/run.sh" -name stderr.log -o -name exit_code) ]]; do
        sleep 0.1
        ((SECONDS < deadline)) || break # a slow start is no failure; status will tell
    done
    [[ ! -e $run_dir/exit_code ]] || { status; return; } # over already
    echo "$name: $ranks $processors process(es) started on $host"
    [[ $PWD == "$called_from" ]] || echo "in $PWD:"
    echo "  follow:  find logs/ -name \\*stderr.log | xargs tail -f"
    echo "  watch:   tail -F $(< "$run_dir/save_dir")/$name/metrics.jsonl"
    echo "  stop:    bash launch.sh stop --name $name"
}

# --- 3. Status and stop -----------------------------------------------------------------
# A rank can outlive its agent, and a detached child outlives both and any tmux session. But all of
# them inherit the run's id in their environment, and nothing else on the machine carries it.

# The ids of all processes of the run, one a line.
processes() {
    [[ -e $run_dir/run_id ]] || return 0
    grep -lzxF "TRAIN_LLM_RUN_ID=$(< "$run_dir/run_id")" /proc/[0-9]*/environ 2> /dev/null |
        cut -d/ -f3 || true
}

status() {
    local left metrics code=1 state="ended without an exit code: killed, or the machine restarted"
    [[ ! -e $run_dir/exit_code ]] || sleep 0.5 # the script that wrote it is about to end, too
    left=$(processes | wc -l)
    metrics=$(< "$run_dir/save_dir")/$name/metrics.jsonl
    if [[ -e $run_dir/exit_code ]]; then
        code=$(< "$run_dir/exit_code")
        state="failed with exit code $code"
        ((code)) || state=finished
    elif ((left)); then
        code=0 state=running
    fi
    [[ ! -e $run_dir/stopped ]] || { code=1 state="stopped by launch.sh stop"; }

    echo "$name on $host: $state"
    if [[ $metrics -nt $run_dir/run_id ]]; then
        echo "  last row: $(tail -n 1 "$metrics" | grep -o '"step": *[0-9]*' || echo unreadable)," \
            "$(($(date +%s) - $(stat -c %Y "$metrics"))) s ago"
    fi
    [[ $state == running ]] || ((!left)) ||
        echo "  but $left process(es) of it are left: bash launch.sh stop --name $name"
    if [[ -e $run_dir/agent.log ]] && ((code)); then
        # torchrun's table names the rank that failed first; the others were ended because of it
        sed "0,/^==== $(< "$run_dir/run_id") started/d" "$run_dir/agent.log" |
            sed -nE '/^Root Cause/,/^===/s/^ *(rank|exitcode) *: /  first failure: \1 /p'
        echo "  see $run_dir/agent.log and the newest stderr.log files beside it"
    fi
    ((!code))
}

stop() {
    local -A sent=()
    local pids pid command signal=TERM deadline=$((SECONDS + ${STOP_GRACE_SECONDS:-30}))
    [[ $(processes) ]] || { echo "$name on $host: not running"; return; }
    # a run that has an exit code ended before this, and only leftovers are removed
    [[ -e $run_dir/exit_code ]] || touch "$run_dir/stopped"
    while pids=$(processes); [[ $pids ]]; do
        for pid in $pids; do
            [[ ${sent[$pid]:-} != "$signal" ]] || continue
            command=$(tr '\0\n' '  ' 2> /dev/null < "/proc/$pid/cmdline") || true
            [[ $command ]] || continue # it has just ended
            # tmux ends by itself after its last process; ended sooner, it would hang up on torchrun
            [[ $signal$command != TERMtmux* || $pids == "$pid" ]] || continue
            echo "$name on $host: SIG$signal to $pid ${command:0:90}"
            kill -s "$signal" "$pid" 2> /dev/null || true
            sent[$pid]=$signal
        done
        sleep 0.2
        ((SECONDS < deadline)) || signal=KILL
        ((SECONDS < deadline + 30)) || abort "SIGKILL did not end" "${pids//$'\n'/ }"
    done
    echo "$name on $host: no process of it is left"
}

# A shell inside the tmux of a run carries its id: drop it, or stop would end itself.
[[ ! -v TRAIN_LLM_RUN_ID ]] || exec env -u TRAIN_LLM_RUN_ID bash "$0" "$@"
called_from=$PWD
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")"
main "$@"
