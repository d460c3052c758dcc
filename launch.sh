#!/usr/bin/env bash
# Usage: bash launch.sh [check|start|status|logs|errors|stop] [LAUNCHER OPTIONS] [-- OPTIONS...]
#
#   start   check, then start train_llm.py with torchrun in tmux on every host: all of them or none;
#           return when it runs (the default)
#   check   look at every host and list all that is wrong, each with its remedy; start nothing
#   status  each host: running, finished, failed or stopped, its last step and its age; exit status 0
#           unless something failed
#   logs    copy what every host logs to logs/NAME/HOST/ here, show it as it grows, until the run ends
#   errors  which rank failed first, with its last lines, and which were only ended because of it
#   stop    ask the run to save and end, wait for that, then end every process it started
#
#   --hosts FILE                 hosts, one a line: name, user@name, name:port, an alias of ssh_config,
#                                or localhost; the first is the rendezvous host (default: ./hosts)
#   --name NAME                  names the run; --experiment-name among the OPTIONS does the same.
#                                Without a --model-name the built-in demo is trained; NAME is demo
#   --nproc-per-node N|gpu|auto  processes on each host; gpu: one a GPU; auto: one a GPU, or 2 where
#                                there is no GPU (default: auto)
#   --env K[=V]                  set K in the run's environment, to this shell's value or to V;
#                                may be repeated. Values are told to no log and no command line
#   --max-restarts R             times torchrun starts the ranks again after a failure (default: 0)
#   --port P                     of the rendezvous, on the first host (default: 29500)
#   --dry-run                    start: check, print what every host would run, start nothing
#   --force                      start: start although the check failed, and say what was overridden
#   --now                        stop: do not ask the run to save first
#
# Environment: PYTHON (the interpreter, at the same path on every host; default: python on PATH),
# SSH_SECONDS (60: the longest one question to one host may take; the trainer's own check may take
# ten times that), STOP_GRACE_SECONDS (300: how long stop waits for the run to save), KILL_GRACE_SECONDS
# (30: how long SIGTERM may take before SIGKILL). On localhost the whole environment reaches the run;
# other hosts get HF_*, NCCL_*, GLOO_*, PYTORCH_*, TORCH_*, OMP_NUM_THREADS and what --env names.
# The project lies at the same path on every host, and paths among the OPTIONS are relative to it.
# Output goes to logs/NAME/HOST/, results to outputs/NAME/, on the disks of the hosts.

set -euo pipefail

# What `bash launch.sh` trains when no model is named; OPTIONS come after these, and the last wins.
demo_recipe=(
    --model-name demo/model --dataset-name demo/corpus.jsonl
    --seq-length 256 --batch-size 4 --global-batch-size 8 --max-steps 350
    --lr 5e-3 --warmup-steps 20 --log-freq 5
)
at_once=64 # hosts spoken to at the same time

abort() { echo "launch.sh: $*" >&2; exit 1; }
refuse() { echo "launch.sh: $* (bash launch.sh -h tells the usage)" >&2; exit 2; }

# --- 1. What is asked -------------------------------------------------------------------
# Before `--` stand the launcher's own options, after it those of train_llm.py, passed on as they
# are. The launcher reads a few of them (experiment, model, output folder) and changes none.

main() {
    verb=start name='' ranks='' port='' max_restarts='' hosts_file='' options=() environment=()
    dry_run='' force='' now='' given=''
    case ${1:-} in check | start | status | logs | errors | stop) verb=$1; shift ;; esac
    while (($#)); do
        case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
        case $1 in
            --) shift; options=("$@"); break ;;
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch.sh; exit 0 ;;
            --dry-run) dry_run=1 given+=" $1"; shift ;;
            --force) force=1 given+=" $1"; shift ;;
            --now) now=1 given+=" $1"; shift ;;
            --hosts | --name | --nproc-per-node | --env | --max-restarts | --port)
                [[ ${2:-} ]] || refuse "$1 needs a value"
                case $1 in
                    --hosts) hosts_file=$2; [[ $2 == /* ]] || hosts_file=$called_from/$2 ;;
                    --name) name=$2 ;;
                    --nproc-per-node) ranks=$2 ;;
                    --env) add_environment "$2" ;;
                    --max-restarts) max_restarts=$2 ;;
                    --port) port=$2 ;;
                esac
                given+=" $1"
                shift 2 ;;
            *) refuse "unknown option or verb '$1'; options of train_llm.py go after --" ;;
        esac
    done
    refuse_useless_options
    [[ ${ranks:=auto} =~ ^(auto|gpu|[1-9][0-9]{0,3})$ ]] ||
        refuse "--nproc-per-node must be a number of processes, gpu or auto, not '$ranks'"
    [[ ${max_restarts:=0} =~ ^[0-9]{1,4}$ ]] ||
        refuse "--max-restarts must be a number, not '$max_restarts'"
    [[ ${port:=29500} =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] ||
        refuse "--port must be a number from 1 to 65535, not '$port'"
    choose_name
    read_hosts
    asked=("${!hosts[@]}")
    work=$(mktemp -d) # readable by this user alone; what hosts answer goes there
    trap leave EXIT
    "$verb"
}

leave() {
    local job
    for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done # each is a pipeline: a group
    rm -rf "$work"
}

refuse_useless_options() {
    local option allowed='--hosts --name'
    case $verb in
        check) allowed+=' --nproc-per-node --env --port' ;;
        start) allowed+=' --nproc-per-node --env --port --max-restarts --dry-run --force' ;;
        stop) allowed+=' --now' ;;
    esac
    for option in $given; do
        [[ " $allowed " == *" $option "* ]] || refuse "$option has no effect on $verb"
    done
    [[ $verb == start || $verb == check || ! ${options[*]} ]] ||
        refuse "$verb takes no options after --; those belong to start and check"
}

add_environment() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] ||
        refuse "--env wants NAME or NAME=VALUE, not '${1%%=*}'"
    [[ $1 == *=* || -v $1 ]] || refuse "--env $1: there is no $1 in this environment"
    [[ $1 != *=* ]] || export "${1%%=*}=${1#*=}"
    export "${1%%=*}"
    environment+=("${1%%=*}")
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
    demo=''
    if experiment=$(option experiment-name); then
        [[ ! $name || $name == "$experiment" ]] ||
            refuse "--name $name and --experiment-name $experiment: a run has one name, give one"
        name=$experiment
    elif [[ ! $name ]]; then
        [[ $verb != start && $verb != check ]] || ! option model-name > /dev/null ||
            refuse "the run has no name: give --name NAME (it names logs/NAME and outputs/NAME)"
        name=demo
    fi
    # the name becomes part of paths and of a socket's name, which has room for about 107 bytes
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ ]] ||
        refuse "'$name' cannot name a run: use up to 64 letters, digits, dots, dashes, underscores"
    option model-name > /dev/null || demo=1
    [[ ! $demo ]] || options=("${demo_recipe[@]}" "${options[@]}")
    options=(--experiment-name "$name" "${options[@]}")
    save_dir=$(option save-dir) || save_dir=outputs
}

# Logs are filed under the host as the file spells it, not under its hostname: that file alone then
# tells where to look, and two machines that believe they have the same name stay apart. A start
# notes its hosts in logs/NAME/run, for the other verbs: `hosts` may change while a run goes on.
read_hosts() {
    local line number=0 place places=' '
    hosts=() first_ranks=() addresses=() skews=() run_id=''
    local record=logs/$name/run
    if [[ $verb != start && $verb != check && ! $hosts_file && -e $record ]]; then
        { read -r _ run_id
          while read -r host rank address skew; do
              hosts+=("$host") first_ranks+=("$rank") addresses+=("${address#-}") skews+=("$skew")
          done; } < "$record"
        return
    fi
    [[ $verb == start || $verb == check || $hosts_file || -d logs/$name ]] || no_such_run
    : "${hosts_file:=hosts}"
    [[ -f $hosts_file ]] || abort "there is no file $hosts_file; write localhost in it"
    while IFS= read -r line || [[ $line ]]; do
        number=$((number + 1))
        place=${line%%#*}
        place=${place#"${place%%[![:space:]]*}"}
        place=${place%"${place##*[![:space:]]}"}
        [[ $place ]] || continue
        [[ $place =~ ^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*(:[1-9][0-9]{0,4})?$ ]] ||
            abort "$hosts_file, line $number, is no host: '$line'; write name, user@name or name:port"
        [[ $places != *" ${place#*@} "* ]] ||
            abort "$hosts_file, line $number, names a host for the second time: '$line'; remove it"
        places+="${place#*@} "
        hosts+=("$place") first_ranks+=(0) addresses+=('') skews+=(0)
    done < "$hosts_file"
    ((${#hosts[@]})) || abort "$hosts_file names no host; write localhost in it"
}

no_such_run() {
    abort "no run named $name was started here; started were:" \
        "$(cd logs 2> /dev/null && find . -mindepth 1 -maxdepth 1 -type d -printf '%f ')"
}

# --- 2. To every host, and back ---------------------------------------------------------
# A host may be dead, or accept a connection and then hang, and must not keep the others waiting. So
# all are asked at once, each within a time limit. What a host is to do is a function `host_...` of
# this file; it travels, with the variables it reads, over the standard input of ssh: nothing of it
# (secrets, quotes, newlines) is on any command line, and it runs only when it arrived whole. An
# answer is lines of KEY, tab, TEXT; its very first line is the host's clock.

# on_hosts FUNCTION [SECONDS]: runs it on all `asked` hosts; the answer of host i is $work/FUNCTION.i
on_hosts() {
    local i running=0 job
    library=$(functions_of "$1")
    mapfile -t carried < <(compgen -e | grep -E '^(HF_|NCCL_|GLOO_|PYTORCH_|TORCH_)|^OMP_NUM_THREADS$')
    carried+=("${environment[@]}")
    set -m # a process group for each job: it is ended as a whole
    for i in "${asked[@]}"; do
        : > "$work/$1.$i"
        echo cut > "$work/$1.$i.code"
        ((running < at_once)) || { wait -n || true; running=$((running - 1)); }
        ask "$i" "$1" "${2:-${SSH_SECONDS:-60}}" 9>&- &
        running=$((running + 1))
    done
    while [[ $1 == host_start && $(jobs -pr) ]]; do # if one fails, the others wait for it in vain
        sleep 0.2
        cat "$work/$1".*.code | grep -qvxE '0|cut' || continue
        for job in $(jobs -pr); do kill -- "-$job" 2> /dev/null || true; done
    done
    wait 2> /dev/null
    set +m
}

# functions_of FUNCTION: its text, and that of the host_ functions that it uses, and so on
functions_of() {
    local i used text word
    used=("$1")
    for ((i = 0; i < ${#used[@]}; i++)); do
        text=$(declare -f "${used[i]}")
        echo "$text"
        while read -r word; do
            [[ " ${used[*]} " == *" $word "* ]] || ! declare -F "$word" > /dev/null || used+=("$word")
        done < <(grep -oE '\bhost_[a-z_]+' <<< "$text")
    done
}

ask() {
    local answer=$work/$2.$1 clock
    set +e +o pipefail
    compose "$1" "$2" | connect "$1" "$3" 2> "$answer.stderr" | {
        clock='' # what .bashrc prints there comes first
        until [[ $clock == clock* ]]; do IFS= read -r clock || break; done
        echo "${clock#clock } ${EPOCHREALTIME/,/.}" > "$answer.clock"
        case $2 in
            host_stop) tee "$answer" ;;
            host_follow) receive_logs "$1" ;;
            *) cat > "$answer" ;;
        esac
    }
    local code=${PIPESTATUS[1]}
    echo "$code" > "$answer.code"
    return "$code"
}

# compose I FUNCTION: the script for host I
compose() {
    local variable
    host=${hosts[$1]} first_rank=${first_ranks[$1]} address=${addresses[$1]}
    run_dir=logs/$name/$host is_host=$(($1 == 0))
    if [[ $2 == host_follow ]]; then local -A offsets=(); find_offsets; fi
    # shellcheck disable=SC2016
    printf 'echo "clock ${EPOCHREALTIME/,/.}"; set -euo pipefail; there=%q
        cd "$there" || { echo "fail\tthere is no folder $there; copy the project there"; exit 3; }\n' "$PWD"
    for variable in "${carried[@]}"; do printf 'export %s=%q\n' "$variable" "${!variable}"; done
    for variable in name host run_dir save_dir run_id options PYTHON hosts ranks rendezvous \
        port is_host address first_rank demo max_restarts processors start_by grace asked_to_end speaker \
        only KILL_GRACE_SECONDS offsets
    do
        [[ ! -v $variable && $variable != offsets ]] || declare -p "$variable" 2> /dev/null || true
    done
    echo "$library"
    echo "$2 < /dev/null"
}

# connect I SECONDS: runs, on host I, the script on standard input
connect() {
    local host=${hosts[$1]} options=() run="eval \"\$(cat)\""
    if [[ $host == localhost ]]; then
        timeout -k 5 "$2" bash -c "$run"
    else
        [[ $host != *:* ]] || options=(-p "${host##*:}")
        timeout --foreground -k 5 "$2" ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 \
            -o ServerAliveCountMax=3 "${options[@]}" -- "${host%:*}" \
            "exec timeout -k 5 $2 bash -c '$run'"
    fi
}

# gather FUNCTION: reads the answers into fact[I,KEY]; every `fail` and every silence is blamed.
declare -A fact=()
gather() {
    local i key text code
    for i in "${asked[@]}"; do
        while IFS=$'\t' read -r key text; do
            case $key in
                fail) blame "$i" "$text" ;;
                warn) warnings+=("${hosts[i]}: $text") ;;
                plan) fact[$i,plan]+="$text"$'\n' ;;
                *) fact[$i,$key]=$text ;;
            esac
        done < "$work/$1.$i"
        code=$(< "$work/$1.$i.code")
        fact[$i,code]=$code
        [[ $code == 0 || $code == 3 || $code == cut ]] || blame "$i" "$(say_why "$i" "$1" "$code")"
    done
}

say_why() {
    local said
    said=$(grep -v '^\s*$' "$work/$2.$1.stderr" | tail -n 1) || true
    case $3 in
        124 | 137) echo "gave no answer in time; look at it, or set SSH_SECONDS higher" ;;
        255) echo "ssh cannot connect without a password: ${said:-no reason given}; make" \
            "\`ssh -o BatchMode=yes HOST true\` work" ;;
        *) echo "answered with exit code $3: ${said:-nothing}" ;;
    esac
}

# blame I TEXT: the same complaint about many hosts is told once.
complaints=() accused=() warnings=()
blame() {
    local k
    fact[$1,failed]=1
    for k in "${!complaints[@]}"; do
        [[ ${complaints[k]} != "$2" ]] || { accused[k]+=", ${hosts[$1]}"; return 0; }
    done
    complaints+=("$2") accused+=("${hosts[$1]}")
}

# --- 3. Check ---------------------------------------------------------------------------
# Sixty-four hosts rarely agree by themselves, and torchrun tells of a disagreement after minutes or
# by hanging. So every host is asked twice before a start: what it is (host_look), and, knowing its
# rank, whether the trainer and the rendezvous would work on it (host_try). Everything found is told
# together. Cost: half a minute, most of it spent importing torch.

check() {
    find_python
    look_at_hosts
    if ((${#complaints[@]})); then
        tell_complaints
        exit "$refusal"
    fi
    echo "$name can start: ${#hosts[@]} host(s) of $ranks $processors process(es)"
}

find_python() {
    PYTHON=${PYTHON:-$(command -v python || command -v python3)} ||
        abort "no python on PATH: activate the environment, or set PYTHON=/path/to/python"
    type -P "$PYTHON" > /dev/null || abort "PYTHON=$PYTHON is no program"
    PYTHON=$(type -P "$PYTHON")
}

look_at_hosts() {
    local i
    refusal=1
    [[ $run_id ]] || run_id=$name-$(< /proc/sys/kernel/random/uuid)
    find_rendezvous
    probe_shared_folders
    on_hosts host_look
    rm -f {logs,"$save_dir"}/.shared-"$run_id"
    gather host_look
    compare_hosts
    order_ranks

    for i in "${!asked[@]}"; do # what has no Python or no project cannot try it
        [[ ${fact[${asked[i]},gpus]:-} ]] || unset "asked[$i]"
    done
    asked=("${asked[@]}")
    if ((${#asked[@]})); then
        on_hosts host_try $((10 * ${SSH_SECONDS:-60}))
        gather host_try
    fi
    for i in "${asked[@]}"; do
        [[ ! ${fact[$i,unreachable]:-} || ${fact[0,taken]:-} ]] || blame "$i" "${fact[$i,unreachable]}"
        [[ ${fact[$i,refused]:-} != 2 ]] || refusal=2
    done
    asked=("${!hosts[@]}")
    tell_hosts
}

# The address of the first host, as this machine resolves it. Its own name may mean 127.0.1.1 to
# itself; then, and for localhost, it is the address from which the second host would be reached.
find_rendezvous() {
    rendezvous=localhost
    ((${#hosts[@]} > 1)) || return 0
    command -v ip > /dev/null || abort "ip is needed for several hosts: apt-get install iproute2"
    rendezvous=$(address_of 0)
    [[ $rendezvous != 127.* ]] ||
        rendezvous=$(ip -4 route get "$(address_of 1)" | sed -nE '1s/.* src ([0-9.]+).*/\1/p')
}

address_of() {
    local host=${hosts[$1]} found
    if [[ $host == localhost ]]; then echo 127.0.0.1; return; fi
    found=$(ssh -T -G -- "${host%:*}" | sed -n 's/^hostname //p') || abort "ssh cannot read its config"
    getent ahostsv4 "$found" | sed -n '1s/ .*//p' | grep . ||
        abort "$host: $found has no IPv4 address here; name it in /etc/hosts, or write its address"
}

# A file that this machine makes and a host sees lies on a shared disk.
probe_shared_folders() {
    mkdir -p logs "$save_dir" || abort "cannot make logs/ and $save_dir here"
    touch {logs,"$save_dir"}/.shared-"$run_id"
}

compare_hosts() {
    local i key theirs first='' clock arrival skew other
    for i in "${asked[@]}"; do
        [[ ${fact[$i,gpus]:-} ]] || continue
        read -r clock arrival < "$work/host_look.$i.clock"
        skew=$(((10#${clock/./} - 10#${arrival/./}) / 1000)) # milliseconds; an answer's travel counts
        skews[i]=$skew addresses[i]=${fact[$i,address]:-}
        if ((skew > 5000 || skew < -5000)); then
            blame "$i" "its clock is $(seconds "$skew") s off this machine's, and torchrun drops nodes whose clocks differ; set the time: timedatectl set-ntp true"
        elif ((skew > 1000 || skew < -1000)); then
            warnings+=("${hosts[i]}: its clock is $(seconds "$skew") s off this machine's")
        fi
        if [[ $ranks == gpu && ${fact[$i,gpus]} == 0 ]]; then
            blame "$i" "has no GPU that torch sees; use --nproc-per-node auto, or mend the driver"
        elif [[ $ranks =~ ^[0-9]+$ && ${fact[$i,gpus]} != 0 && $ranks -gt ${fact[$i,gpus]} ]]; then
            blame "$i" "--nproc-per-node $ranks is more than its ${fact[$i,gpus]} GPUs"
        fi
        if [[ ! $first ]]; then first=$i; continue; fi
        for key in train_llm.py download.py python torch cuda nccl transformers driver gpus; do
            theirs=${fact[$i,$key]:-none}
            [[ $theirs != "${fact[$first,$key]:-none}" ]] || continue
            case $key in
                *.py) blame "$i" "has another $key than ${hosts[first]}; copy the project there again" ;;
                gpus) blame "$i" "has $theirs GPUs, ${hosts[first]} has ${fact[$first,gpus]}; all hosts need the same number" ;;
                *) blame "$i" "has $key $theirs, ${hosts[first]} has ${fact[$first,$key]:-none}; install the same" ;;
            esac
        done
        for other in "${asked[@]}"; do
            [[ $other -lt $i && ${addresses[i]} && ${addresses[other]} == "${addresses[i]}" ]] || continue
            blame "$i" "has the address ${addresses[i]} of ${hosts[other]}: the same machine under two names; remove one"
        done
    done
    if [[ ! $first ]]; then processors=CPU; return; fi
    [[ ${fact[$first,gpus]} == 0 ]] && processors=CPU || processors=GPU
    [[ $ranks != gpu && $ranks != auto ]] || ranks=${fact[$first,gpus]}
    ((ranks)) || ranks=2
}

seconds() { # MILLISECONDS, with the sign in front
    local sign=+
    (($1 >= 0)) || sign=-
    printf '%s%d.%03d' $sign $((${1#-} / 1000)) $((${1#-} % 1000))
}

# c10d numbers nodes by their sorted addresses, as text, not by their order in the file.
order_ranks() {
    local i position=0
    rank_0=0
    [[ $ranks =~ ^[0-9]+$ ]] || return 0 # no host told how many GPUs it has
    while read -r _ i; do
        ((position)) || rank_0=$i
        first_ranks[i]=$((position++ * ranks))
    done < <(for i in "${!hosts[@]}"; do echo "${addresses[i]:-~} $i"; done | LC_ALL=C sort -s -k1,1)
}

tell_hosts() {
    local i state warning
    for i in "${!hosts[@]}"; do
        state=ok
        [[ ! ${fact[$i,failed]:-} ]] || state=FAILED
        printf '%-20s %-6s ' "${hosts[i]}" "$state"
        if [[ ${fact[$i,gpus]:-} ]]; then about_host "$i"; else echo; fi
    done
    for warning in "${warnings[@]}"; do echo "warning: $warning"; done
    printf '%s' "${fact[$rank_0,plan]:-}"
    ((${#hosts[@]} == 1)) ||
        echo "rank 0, which reads the weights and writes metrics.jsonl, is on ${hosts[rank_0]}" \
            "${addresses[rank_0]:+(${addresses[rank_0]}, the first of the sorted addresses)}"
}

about_host() {
    if [[ ${fact[$1,gpus]} != 0 ]]; then printf '%s x %s' "${fact[$1,gpus]}" "${fact[$1,gpu]:-GPU}"
    else printf 'CPU only'; fi
    if ((${#hosts[@]} > 1)); then
        printf ', %s on %s, clock %s s' "${addresses[$1]}" "${fact[$1,interface]:-?}" "$(seconds "${skews[$1]}")"
    fi
    printf ', torch %s, free: logs %s GiB, %s %s GiB' "${fact[$1,torch]}" "${fact[$1,logs_gib]}" \
        "$save_dir" "${fact[$1,save_gib]}"
    if ((${#hosts[@]} > 1)); then
        printf '; logs on %s disk, %s on %s' "${fact[$1,logs_disk]}" "$save_dir" "${fact[$1,save_disk]}"
    fi
    echo
}

tell_complaints() {
    local k
    for k in "${!complaints[@]}"; do echo "launch.sh: ${accused[k]}: ${complaints[k]}"; done >&2
    [[ ${1:-} == overridden ]] ||
        echo "launch.sh: options refused or hosts not ready; nothing was started" >&2
}

host_say() { printf '%s\t%s\n' "$1" "${*:2}"; }

host_look() {
    local tool missing='' file sum
    for tool in tmux flock timeout sha256sum; do
        command -v "$tool" > /dev/null || missing+=" $tool"
    done
    ((${#hosts[@]} == 1)) || command -v ip > /dev/null || missing+=" iproute2"
    [[ ! $missing ]] || host_say fail "lacks$missing: apt-get install$missing"
    [[ ! $(host_processes) ]] ||
        host_say fail "$name is already running; give another --name, or: bash launch.sh stop --name $name"
    for file in train_llm.py download.py; do
        [[ -e $file ]] || { host_say fail "has no $PWD/$file; copy the project there"; continue; }
        read -r sum _ < <(sha256sum "$file")
        host_say "$file" "$sum"
    done
    host_disks
    host_limits
    ((${#hosts[@]} == 1)) || host_network
    if command -v nvidia-smi > /dev/null; then host_gpus; fi
    host_packages # last: who says how many GPUs there are got as far as this
}

host_disks() {
    local folder key gib
    mkdir -p logs || { host_say fail "cannot make $PWD/logs; give this user the right to"; return 0; }
    for key in logs save; do
        [[ $key == logs ]] && folder=logs || folder=$save_dir
        host_say "${key}_disk" "$([[ -e $folder/.shared-$run_id ]] && echo "this machine's" || echo "its own")"
        while [[ ! -d $folder ]]; do folder=$(dirname -- "$folder"); done
        gib=$(($(host_free_mib "$folder") / 1024))
        host_say "${key}_gib" "$gib"
        ((gib)) || host_say fail "has less than 1 GiB free in $folder; make room"
    done
}

host_free_mib() {
    local free=0
    { read -r && read -r free; } < <(df --block-size=1M --output=avail "$1" 2> /dev/null) || true
    echo "$free"
}

host_limits() {
    local files memory shm
    files=$(ulimit -Hn) # run.sh raises the soft limit to it
    [[ $files == unlimited ]] || ((files >= 4096)) ||
        host_say fail "may open $files files at once (ulimit -Hn), training wants 4096; raise nofile in /etc/security/limits.conf"
    memory=$(ulimit -Hl)
    [[ $memory == unlimited || ! -e /sys/class/infiniband ]] || ((memory > 1 << 26)) ||
        host_say fail "has InfiniBand, but may lock $memory KiB of memory (ulimit -Hl); set memlock unlimited in /etc/security/limits.conf"
    shm=$(host_free_mib /dev/shm)
    ((shm >= 512)) ||
        host_say fail "has $shm MiB free in /dev/shm, NCCL wants 512; in Docker: --shm-size 1g, else: mount -o remount,size=1g /dev/shm"
}

host_network() {
    local own='' source interface=''
    read -r own _ < <(getent ahostsv4 "${HOSTNAME:=$(uname -n)}") || true
    [[ $own != 127.* ]] ||
        host_say warn "its name $HOSTNAME means $own to itself; harmless here, where addresses are given"
    source=$(ip -4 route get "$rendezvous" 2> /dev/null | sed -nE '1s/.* src ([0-9.]+).*/\1/p') || true
    [[ $source && $source != 127.* ]] || {
        host_say fail "has no route to the rendezvous host $rendezvous; ask: ip route get $rendezvous"
        return 0
    }
    read -r _ interface _ < <(ip -4 -o addr show to "$source")
    host_say address "$source"
    host_say interface "${interface%%@*}"
}

host_gpus() {
    local line index name driver ecc used pid program busy=''
    while IFS=$'\t' read -r index name driver ecc used; do
        ((index)) || { host_say driver "$driver"; host_say gpu "$name"; }
        [[ $ecc == [1-9]* ]] && host_say fail "GPU $index has $ecc uncorrected ECC errors; reset or replace it"
        [[ $used =~ ^[0-9]+$ ]] && ((used > 1024)) && busy+=" $index ($used MiB)"
    done < <(nvidia-smi --format=csv,noheader,nounits --query-gpu=index,name,driver_version,ecc.errors.uncorrected.volatile.total,memory.used |
        sed 's/, /\t/g')
    line=''
    while IFS=$'\t' read -r pid program; do
        line+=" $pid of $(ps -o user= -p "$pid" 2> /dev/null || echo another container) ($program)"
    done < <(nvidia-smi --format=csv,noheader --query-compute-apps=pid,process_name 2> /dev/null | sed 's/, /\t/')
    if [[ $line ]]; then host_say fail "its GPUs are used by process$line; end them, or take other hosts"
    elif [[ $busy ]]; then host_say fail "memory is in use on GPU$busy, by no process seen here; look for another container"; fi
    nvidia-smi --format=csv,noheader --query-remapped-rows=remapped_rows.pending,remapped_rows.failure 2> /dev/null |
        grep -Eq '(^|, )(Yes|[1-9])' && host_say fail "a GPU waits for a row remapping, or one failed; reset or replace it"
    line=$(dmesg 2> /dev/null | grep 'NVRM: Xid' | tail -n 1) || true
    [[ ! $line ]] || host_say warn "the driver reported since boot: $line"
}

host_packages() {
    [[ -x $PYTHON ]] || { host_say fail "has no $PYTHON; make the same Python environment at the same path"; return 0; }
    "$PYTHON" - 2>&1 << 'EOF' || true
import importlib.util, sys
needed = ("torch", "transformers", "datasets", "huggingface_hub", "tqdm")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
remedy = f"run: {sys.executable} -m pip install -r requirements.txt"
if missing:
    sys.exit(f"fail\t{sys.executable} lacks {', '.join(missing)}; {remedy}")
try:
    import importlib.metadata, torch
except Exception as error:
    sys.exit(f"fail\ttorch cannot be imported ({error}); {remedy}")
print(f"python\t{' '.join(sys.version.split())}\ntorch\t{torch.__version__}\ncuda\t{torch.version.cuda}")
print(f"nccl\t{torch.cuda.nccl.version() if torch.cuda.is_available() else None}")
print(f"transformers\t{importlib.metadata.version('transformers')}\ngpus\t{torch.cuda.device_count()}")
EOF
}

host_try() {
    local said code=0 port_test='' gib
    if ((${#hosts[@]} > 1)); then host_test_port & port_test=$!; fi
    if [[ $demo ]] && ! said=$("$PYTHON" download.py --demo 2>&1); then
        host_say fail "download.py --demo failed: $(tail -n 1 <<< "$said")"
    elif said=$(WORLD_SIZE=$((${#hosts[@]} * ranks)) RANK=$first_rank "$PYTHON" train_llm.py --check \
        "${options[@]}" 2>&1); then
        printf 'plan\t%s\n' "${said//$'\n'/$'\n'plan$'\t'}"
        host_disk_for_checkpoint "$said"
    else
        code=$?
        host_say refused "$code"
        said=$(grep -v '^\s*$' <<< "$said" | tail -n 1) || true
        host_say fail "${said:-train_llm.py --check left with status $code and no word}"
    fi
    [[ ! $port_test ]] || wait "$port_test"
}

# Weights and two moments in float32 are 12 bytes a parameter, split over the hosts.
host_disk_for_checkpoint() {
    local folder=$save_dir free need
    [[ $1 =~ ([0-9,]+)\.[0-9]\ M\ parameters ]] || return 0
    need=$((${BASH_REMATCH[1]//,/} * 12 / 1000 / ${#hosts[@]}))
    while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
    free=$(($(host_free_mib "$folder") / 1024))
    ((free >= need)) ||
        host_say fail "has $free GiB free in $folder, and one checkpoint takes about $need there; make room or choose another --save-dir"
}

# The first host listens on the rendezvous port until every other was there, each tries to reach it.
host_test_port() {
    local holder
    "$PYTHON" - "$is_host" "$rendezvous" "$port" "$run_id" "$host" "${#hosts[@]}" << 'EOF' && return 0
import socket, sys, time
listens, address, port, token, host, hosts = sys.argv[1:]
token, port, deadline = token.encode(), int(port), time.monotonic() + 8
if listens == "1":
    server, seen = socket.socket(), {host}
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("", port))
    except OSError as error:
        print(f"taken\t{error}")
        sys.exit(1)
    server.listen(1024)
    while len(seen) < int(hosts) and (left := deadline + 5 - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            with server.accept()[0] as visitor:
                visitor.settimeout(2)
                seen.add(visitor.recv(200).decode())
                visitor.sendall(token)
        except OSError:
            continue
    sys.exit()
why = "no answer"
while time.monotonic() < deadline:
    try:
        with socket.create_connection((address, port), timeout=3) as server:
            server.sendall(host.encode())
            if server.recv(200) == token:
                sys.exit()
            why = "another program answers"
    except OSError as error:
        why = str(error)
    time.sleep(0.3)
print(f"unreachable\tcannot reach the rendezvous at {address}:{port} ({why}); open that port, or name"
      " another with --port")
EOF
    ((is_host)) || return 0
    holder=$(ss -Hltnp "sport = :$port" 2> /dev/null | sed -nE '1s/.*users:\(\("([^"]+)",pid=([0-9]+).*/ by \1, process \2/p') || true
    host_say fail "port $port, for the rendezvous, is taken$holder; give another --port"
}

# --- 4. Start ---------------------------------------------------------------------------
# A run must outlive this shell, and what it was told must arrive unchanged. So on each host a
# generated script holds the command, and a tmux server of this run alone runs it (a server passes on
# the environment that its *first* session came with). Half a run is worse than none: if one host
# does not start, or this shell is interrupted, the others are stopped again.

start() {
    local i
    find_python
    mkdir -p logs
    exec 9> logs/.lock # one start at a time: a second one waits, then finds the name taken
    flock 9
    look_at_hosts
    if [[ $dry_run ]]; then dry_run; fi
    if ((${#complaints[@]})); then
        [[ $force ]] || { tell_complaints; exit "$refusal"; }
        echo "launch.sh: started in spite of this, because of --force:" >&2
        tell_complaints overridden
    fi
    [[ $ranks =~ ^[0-9]+$ ]] || abort "no host can be started"

    mkdir -p "logs/$name"
    { echo "run $run_id"
      for i in "${!hosts[@]}"; do
          echo "${hosts[i]} ${first_ranks[i]} ${addresses[i]:--} ${skews[i]}"
      done; } > "logs/$name/run"
    complaints=() accused=()
    trap 'trap "" INT TERM; echo "launch.sh: interrupted" >&2; take_back; exit 130' INT TERM
    # a host that hung and comes back later must not start what was given up
    start_by=$((EPOCHSECONDS + ${SSH_SECONDS:-60} + 6))
    on_hosts host_start
    gather host_start
    if ((${#complaints[@]})); then
        for i in "${!complaints[@]}"; do echo "launch.sh: ${accused[i]}: ${complaints[i]}"; done >&2
        take_back
        exit 1
    fi
    tell_started
}

take_back() {
    local i
    echo "launch.sh: not every host started, so what did start is stopped" >&2
    speaker='' asked_to_end='' only=1 # this very run, and none that was there before
    on_hosts host_stop $((2 * ${SSH_SECONDS:-60} + ${KILL_GRACE_SECONDS:-30})) >&2
    for i in "${asked[@]}"; do
        [[ $(< "$work/host_stop.$i.code") == 0 ]] ||
            echo "launch.sh: ${hosts[i]} could not be told to stop; when it answers again: bash launch.sh stop --name $name" >&2
    done
}

dry_run() {
    local i
    for i in "${!hosts[@]}"; do
        host=${hosts[i]} address=${addresses[i]} is_host=$((i == 0)) run_dir=logs/$name/$host
        host_torchrun
        printf '%s:' "$host"
        printf ' %q' "${torchrun[@]}"
        printf '\n  with %s and the variables %s\n' "PYTHON=$PYTHON" "${environment[*]:-of this shell}"
    done
    if ((${#complaints[@]})); then tell_complaints; exit "$refusal"; fi
    exit 0
}

tell_started() {
    local i over=1 shared=1
    for i in "${!hosts[@]}"; do
        [[ ${fact[$i,exit_code]:-} ]] || over=''
        [[ ${hosts[i]} == localhost || ${fact[$i,logs_disk]} != "its own" ]] || shared=''
    done
    if [[ $over ]]; then status; return; fi
    echo "$name: $ranks $processors process(es) started on ${#hosts[@]} host(s): ${hosts[*]}"
    [[ $PWD == "$called_from" ]] || echo "in $PWD:"
    if [[ $shared ]]; then echo "  follow:  find logs/ -name \\*stderr.log | xargs tail -f"
    else echo "  follow:  bash launch.sh logs --name $name    (the logs are on each host's own disk)"; fi
    printf '  watch:   python top-cluster.py %q%s\n' "$hosts_file" \
        "$([[ $save_dir == outputs ]] || printf ' --save-dir %q' "$save_dir")"
    echo "  stop:    bash launch.sh stop --name $name"
}

# Runs of this name in another folder are other runs: the socket's name tells them apart.
host_socket() {
    local sum
    read -r sum _ < <(cksum <<< "$PWD $host")
    echo "train_llm-$name-$sum"
}

host_start() {
    local cores socket deadline=$((SECONDS + 30))
    ((EPOCHSECONDS <= start_by)) || { host_say fail "got the start too late and left it"; exit 3; }
    mkdir -p "$run_dir"
    exec 8> "$run_dir/.lock"
    socket=$(host_socket)
    if ! flock -w 5 8 || [[ $(host_processes) ]] || tmux -L "$socket" has-session 2> /dev/null; then
        host_say fail "$name is already running; give another --name, or: bash launch.sh stop --name $name"
        exit 3
    fi
    [[ ! -e $run_dir/given_up || $(< "$run_dir/given_up") != "$run_id" ]] || { host_say fail "came too late"; exit 3; }
    rm -f "$run_dir"/{exit_code,stopped,given_up} "$save_dir/$name/stop-requested"
    echo "$run_id/$host" > "$run_dir/run_id"
    echo "$save_dir" > "$run_dir/save_dir"
    host_torchrun
    host_write_run_script > "$run_dir/run.sh"
    if ((${#hosts[@]} > 1)); then
        read -r _ interface _ < <(ip -4 -o addr show to "$address")
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${interface%%@*}}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=${interface%%@*}} # = means: this very name
    fi
    # FSDP's buffers vary in size: less memory is lost between them
    [[ $processors == CPU || ${PYTORCH_CUDA_ALLOC_CONF:-} ]] ||
        export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # torchrun would set 1, which leaves cores idle: on the CPU, and in an offloaded AdamW
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    ulimit -n "$(ulimit -Hn)"
    # -f /dev/null: the user's tmux.conf could keep panes or start other programs in them
    TRAIN_LLM_RUN_ID=$run_id/$host \
        tmux -L "$socket" -f /dev/null new-session -d bash "$run_dir/run.sh" 8>&- 9>&-
    exec 8>&-

    # The command to follow the logs is useless before torchrun has made them.
    until [[ $(find "$run_dir" -newer "$run_dir/run.sh" -name stderr.log -o -name exit_code) ]]; do
        sleep 0.1
        ((SECONDS < deadline)) || break # a slow start is no failure; status will tell
    done
    [[ -e $run_dir/exit_code ]] || return 0
    host_say exit_code "$(< "$run_dir/exit_code")"
    [[ $(< "$run_dir/exit_code") != 0 && ${#hosts[@]} != 1 ]] || return 0
    host_say fail "ended at once with exit code $(< "$run_dir/exit_code"): $(
        grep -E 'Error|error' "$run_dir/agent.log" | tail -n 1 | cut -c 1-200); see $run_dir there"
    exit 3
}

# Sets torchrun. Each $ is doubled because torchrun reads ${local_rank} and $$ in arguments as macros
# (torch 2.13, elastic/utils/api.py).
host_torchrun() {
    torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$ranks")
    if ((${#hosts[@]} == 1)); then torchrun+=(--standalone); else
        torchrun+=(
            --nnodes "${#hosts[@]}" --rdzv-backend c10d --rdzv-endpoint "$rendezvous:$port"
            --rdzv-id "$run_id" --rdzv-conf "is_host=$is_host" --local-addr "$address"
        )
    fi
    torchrun+=(--max-restarts "$max_restarts" --log-dir "$run_dir" --redirects 3)
    torchrun+=(train_llm.py "${options[@]//\$/\$\$}")
}

# The script that tmux runs; %q keeps every byte of an argument. When another host makes the ranks
# here start again, torchrun removes the logs of this attempt (torch 2.13, multiprocessing/api.py),
# so a hard link to each is kept while it lives, and gets its name in kept/ when the original is gone.
host_write_run_script() {
    local keep=''
    ((max_restarts == 0)) || keep="
mkdir -p $run_dir/kept
while sleep 1; do
    find $run_dir -path '*/attempt_*/std*.log' -printf '%p %i\\n' | while read -r log inode; do
        attempt=\${log#*/attempt_}
        attempt=\${attempt%/*}
        ln \"\$log\" \"$run_dir/kept/attempt_\${attempt//\\//-}-\$inode-\${log##*/}.live\" 2> /dev/null
    done
    find $run_dir/kept -links 1 -name '*.live' | while read -r lost; do mv \"\$lost\" \"\${lost%.live}\"; done
done &
keeper=\$!"
    cat << EOF
#!/usr/bin/env bash
# Written by launch.sh start and overwritten by the next one.
trap : HUP INT TERM # outlive torchrun, to write down how it ended
cd $(printf %q "$PWD") || exit$keep
{
    echo "==== \$TRAIN_LLM_RUN_ID started \$(date --iso-8601=seconds)"
   $(printf ' %q' "${torchrun[@]}")
    code=\$?
    echo "==== \$TRAIN_LLM_RUN_ID ended \$(date --iso-8601=seconds) with exit code \$code"
} >> $run_dir/agent.log 2>&1
[[ ! \${keeper:-} ]] || { sleep 2; kill \$keeper; find $run_dir/kept -name '*.live' -delete; }
echo "\$code" > $run_dir/exit_code.part && mv $run_dir/exit_code.part $run_dir/exit_code
EOF
}

# --- 5. Status and errors ---------------------------------------------------------------
# A rank can outlive its agent, and a detached child outlives both and any tmux session. But all of
# them inherit the run's id in their environment, and nothing else on the machine carries it. Who
# failed first is not who was reported first: the others fail or are ended within milliseconds, on
# hosts whose clocks differ. So times are corrected by the skew measured at the start, and a rank
# that only lost its connection, or was told to end, comes after one that failed by itself.

status() {
    local i ok=0 line
    on_hosts host_status
    gather host_status
    known=''
    for i in "${asked[@]}"; do [[ ${fact[$i,state]:-none} == none ]] || known=1; done
    [[ $known || ${#complaints[@]} != 0 ]] || no_such_run
    for i in "${asked[@]}"; do
        if [[ ${fact[$i,failed]:-} ]]; then ok=1; echo "$name on ${hosts[i]}: not to be reached"; continue; fi
        line=${fact[$i,state]:-none}
        case $line in running | finished) ;; *) ok=1 ;; esac
        [[ $line != none ]] || line="never started here"
        [[ ${fact[$i,attempt]:-0} == 0 ]] || line+=", attempt ${fact[$i,attempt]}"
        [[ ! ${fact[$i,step]:-} ]] || line+=", ${fact[$i,step]}"
        ((${#hosts[@]} == 1)) || [[ ${addresses[i]} == '' || ${first_ranks[i]} != 0 ]] || line+="  (rank 0)"
        echo "$name on ${hosts[i]}: $line"
        [[ ${fact[$i,state]} == running || ${fact[$i,left]:-0} == 0 ]] ||
            echo "  but ${fact[$i,left]} process(es) of it are left: bash launch.sh stop --name $name"
        [[ ${fact[$i,state]} != failed* && ${fact[$i,state]} != ended* ]] ||
            echo "  who failed first: bash launch.sh errors --name $name"
    done
    for i in "${!complaints[@]}"; do echo "launch.sh: ${accused[i]}: ${complaints[i]}"; done >&2
    return "$ok"
}

errors() {
    local i field time rank local_rank code kind log message first='' first_time later
    on_hosts host_errors
    gather host_errors
    : > "$work/failures"
    for i in "${asked[@]}"; do
        while IFS=$'\t' read -r field time rank local_rank code kind log message; do
            [[ $field == failure ]] || continue
            printf '%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n' "$kind" $((time - 1000 * skews[i])) "$i" \
                "$rank" "$local_rank" "$code" "$log" "$message"
        done < "$work/host_errors.$i"
    done | sort -t $'\t' -k1,1 -k2,2n > "$work/failures"
    while IFS=$'\t' read -r kind time i rank local_rank code log message; do
        if [[ ! $first ]]; then
            first=1 first_time=$time
            echo "$name: first to fail: $rank on ${hosts[i]} (local rank or GPU $local_rank)," \
                "$code, at $(date -d "@$((time / 1000000))" '+%F %T').$(printf %06d $((time % 1000000)))"
            echo "  $message"
            echo "  the last lines of $log on ${hosts[i]}:"
            sed -n "s/^tail\t$local_rank\t/  | /p" "$work/host_errors.$i"
            continue
        fi
        later=$(seconds $(((time - first_time) / 1000)))
        if [[ $kind == 1own ]]; then echo "failed as well: $rank on ${hosts[i]}, $code, $later s: $message"
        else echo "only ended because of it: $rank on ${hosts[i]}, $code, $later s: $message"; fi
    done < "$work/failures"
    for i in "${asked[@]}"; do
        [[ ! ${fact[$i,state]:-} ]] || echo "${hosts[i]}: ${fact[$i,state]}"
    done
    for i in "${!complaints[@]}"; do echo "launch.sh: ${accused[i]}: ${complaints[i]}"; done >&2
    [[ $first ]] || echo "$name: no rank failed"
    ((!${#complaints[@]}))
}

host_id() {
    local id=${run_id:-none}/$host
    [[ ! -e $run_dir/run_id ]] || read -r id < "$run_dir/run_id"
    echo "$id"
}

# The ids of all processes of the run on this host, one a line.
host_processes() {
    local path
    while IFS=/ read -r _ _ path _; do echo "$path"; done < <(
        grep -lzxF "TRAIN_LLM_RUN_ID=$(host_id)" /proc/[0-9]*/environ 2> /dev/null)
}

# running | finished | failed ... | stopped ... | ended ... | none
host_state() {
    local code
    [[ -e $run_dir/run_id ]] || { echo none; return; }
    if [[ -e $run_dir/exit_code ]]; then
        code=$(< "$run_dir/exit_code")
        if [[ -e $run_dir/stopped ]]; then echo "stopped by launch.sh stop, exit code $code"
        elif ((code)); then echo "failed with exit code $code"
        else echo finished; fi
    elif [[ -e $run_dir/stopped ]]; then echo "stopped by launch.sh stop"
    elif [[ $(host_processes) ]]; then echo running
    else echo "ended without an exit code: killed, or the machine restarted"; fi
}

host_status() {
    [[ ! -e $run_dir/exit_code ]] || sleep 0.5 # the script that wrote it is about to end, too
    host_say state "$(host_state)"
    host_say left "$(host_processes | wc -l)"
    [[ -e $run_dir/run_id ]] || return 0
    host_say attempt "$(find "$run_dir" -newer "$run_dir/run.sh" -name 'attempt_*' -type d \
        -printf '%f\n' | sed 's/attempt_//' | sort -n | tail -n 1)"
    host_say step "$(host_step)"
}

# The last step of this host's slowest rank by its heartbeat, else the last row of the metrics.
host_step() {
    local folder file line oldest='' said='' value='": *"?([^,"}]*)'
    folder=$(< "$run_dir/save_dir")/$name
    while IFS= read -r file; do
        line=$(< "$file") || continue
        [[ ! $line =~ \"host$value || ${BASH_REMATCH[1]} == "$(uname -n)" ]] || continue
        [[ $line =~ \"time$value ]] || continue
        [[ ! $oldest || ${BASH_REMATCH[1]%.*} -lt $oldest ]] || continue
        oldest=${BASH_REMATCH[1]%.*} said=step
        [[ ! $line =~ \"step$value ]] || said+=" ${BASH_REMATCH[1]}"
        [[ ! $line =~ \"steps$value ]] || said+=" of ${BASH_REMATCH[1]}"
        [[ ! $line =~ \"phase$value ]] || said+=" (${BASH_REMATCH[1]})"
    done < <(find "$folder/heartbeats" -newer "$run_dir/run_id" -name 'rank-*.json' 2> /dev/null)
    if [[ ! $said && $folder/metrics.jsonl -nt $run_dir/run_id ]]; then
        line=$(tail -n 1 "$folder/metrics.jsonl")
        [[ $line =~ \"step\":\ *([0-9]+) ]] && said="step ${BASH_REMATCH[1]}"
        oldest=$(stat -c %Y "$folder/metrics.jsonl")
    fi
    [[ ! $said ]] || echo "$said, $((EPOCHSECONDS - oldest)) s ago"
}

# One line for each rank of the newest attempt that failed or was ended:
# failure, microseconds, rank, local rank, how, kind, log, message
host_errors() {
    local state attempt table='' folder time rank local_rank code kind message seen=' '
    local lost='Connection (reset|closed|refused)|Broken pipe|[Rr]emote (process|error|peer)|closed by peer'
    lost+='|NCCL error|ncclRemoteError|DistBackendError|DistNetworkError|DistStoreError|Timed out|timed out|Watchdog'
    state=$(host_state)
    [[ $state != none && $state != finished ]] || return 0
    host_say state "$state"
    attempt=$(find "$run_dir" -newer "$run_dir/run.sh" -name 'attempt_*' -type d | sort -V | tail -n 1)
    [[ ! -e $run_dir/agent.log ]] || table=$(host_failures)
    while read -r time rank local_rank code; do
        [[ $time ]] || continue
        folder=$attempt/$local_rank seen+="$local_rank "
        message=$(host_exception "$folder/stderr.log") || true
        [[ ! $message ]] || time=$(stat -c %.6Y "$folder/stderr.log")
        kind=1own
        [[ $code != -15 && ! $message =~ $lost ]] || kind=2ended
        [[ $code != -* ]] || message+=" (ended by signal ${code#-})"
        host_failure "$time" "rank $rank" "$local_rank" "exit code $code" "$kind" \
            "$folder/stderr.log" "${message:-no word in its log}"
    done <<< "$table"
    if [[ ! $table && ( $state == failed* || $state == ended* ) ]]; then
        code=$(cat "$run_dir/exit_code" 2> /dev/null || echo unknown)
        message="torchrun itself ended ($state)"
        ((code <= 128)) 2> /dev/null || message="torchrun was killed by signal $((code - 128))"
        [[ $code == [1-9]* ]] && ((code <= 128)) && message=$(host_exception "$run_dir/agent.log")
        kind=1own
        [[ ! $message =~ $lost ]] || kind=2ended
        time=$(stat -c %.6Y "$run_dir/exit_code" 2> /dev/null || stat -c %.6Y "$run_dir/run_id")
        host_failure "$time" torchrun - "exit code $code" "$kind" "$run_dir/agent.log" "$message"
    fi
    [[ $state != running && $attempt ]] || return 0
    for folder in "$attempt"/*/; do
        local_rank=$(basename "$folder")
        [[ $local_rank =~ ^[0-9]+$ && $seen != *" $local_rank "* ]] || continue
        host_failure "$(stat -c %.6Y "$folder/stderr.log")" "rank $((first_rank + local_rank))" \
            "$local_rank" "no exit code of its own" 2ended "$folder/stderr.log" "ended by torchrun"
    done
}

host_failure() { # SECONDS.MICROSECONDS RANK LOCAL_RANK HOW KIND LOG MESSAGE
    local time=${1/./}
    printf 'failure\t%s' "$time"; printf '\t%s' "${@:2}"; echo
    tail -n 15 "$6" 2> /dev/null | tr '\r' '\n' | tail -n 15 | sed "s/^/tail\t$3\t/" || true
}

# What ended a process, by the last line that says so in its log.
host_exception() {
    grep -aE '^(\[rank[0-9]+\]: *)?([A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b|[A-Za-z_.]+: error:)' "$1" |
        tail -n 1 | tr '\t' ' ' | cut -c 1-300
}

# torchrun's tables of this start: seconds, rank, local rank, exit code
host_failures() {
    sed "0,\|^==== $(host_id) started|d" "$run_dir/agent.log" | awk '
        / time +: / {split($3, t, /[-_:]/); time = mktime(t[1] " " t[2] " " t[3] " " t[4] " " t[5] " " t[6])}
        / rank +: / {rank = $3; gsub(/[^0-9]/, "", $5); local_rank = $5}
        / exitcode +: / {print time ".000000", rank, local_rank, $3}'
}

# --- 6. Logs ----------------------------------------------------------------------------
# Following wants files that are here. Each host sends what its logs grew by, with the place in the
# file, every second over one connection; what comes is written to that very place, so that nothing
# happens where the disk is shared and the file is the same one. The loop on the host ends with the
# run, or when nobody takes what it says: a remote loop would else outlive its client.

logs() {
    local i
    run_dir=''
    on_hosts host_follow 0
    for i in "${asked[@]}"; do
        [[ $(< "$work/host_follow.$i.code") == 0 ]] ||
            blame "$i" "$(say_why "$i" host_follow "$(< "$work/host_follow.$i.code")")"
    done
    for i in "${!complaints[@]}"; do echo "launch.sh: ${accused[i]}: ${complaints[i]}"; done >&2
    ((!${#complaints[@]}))
}

# Sets offsets: how much of each log is here; a little of it is asked for again, to be shown.
find_offsets() {
    local size path
    while IFS=$'\t' read -r size path; do
        offsets[$path]=$((size > 2000 ? size - 2000 : 0))
    done < <(find "$run_dir" -type f -name '*.log' -printf '%s\t%P\n' 2> /dev/null)
}

receive_logs() {
    local from path data shown='' folder=logs/$name/${hosts[$1]}
    while IFS=$'\t' read -r from path data; do
        [[ $path && $path != /* && $path != *..* ]] || continue
        mkdir -p "$(dirname "$folder/$path")"
        base64 -d <<< "$data" | dd of="$folder/$path" oflag=seek_bytes seek="$from" conv=notrunc status=none
        [[ $path != *stderr.log && $path != agent.log ]] || {
            [[ $shown == "$path" ]] || printf '\n==> %s <==\n' "$folder/$path"
            shown=$path
            base64 -d <<< "$data"
        }
    done
}

host_follow() {
    local ended='' more size path from
    [[ -e $run_dir/run_id ]] || { echo "no run $name was started here" >&2; return 1; }
    while :; do
        [[ $(host_state) == running ]] || ended=1
        more=''
        while IFS=$'\t' read -r size path; do
            from=${offsets[$path]:-0}
            ((size > from)) || continue
            ((size - from <= 65536)) || { size=$((from + 65536)) more=1; }
            printf '%s\t%s\t%s\n' "$from" "$path" \
                "$(tail -c "+$((from + 1))" "$run_dir/$path" | head -c $((size - from)) | base64 -w 0)"
            offsets[$path]=$size
        done < <(find "$run_dir" -type f \( -name '*.log' -o -name exit_code \) -printf '%s\t%P\n')
        echo || exit 0 # ends the loop when nobody listens
        [[ ! $more ]] || continue
        [[ ! $ended ]] || break
        sleep 1
    done
}

# --- 7. Stop ----------------------------------------------------------------------------
# The trainer saves and leaves at the next step if it finds the file stop-requested. That needs every
# rank, so where a host has failed or cannot be reached nobody is asked. After that, and a grace,
# what still carries the run's id gets SIGTERM, and after another SIGKILL.

stop() {
    local i failed=0 reached=()
    grace=${STOP_GRACE_SECONDS:-300} asked_to_end=1 speaker='' known='' running=''
    if [[ $now && $run_id ]]; then known=1; else # else nobody needs to know how far it is
        on_hosts host_status
        gather host_status
    fi
    for i in "${asked[@]}"; do
        [[ ${fact[$i,state]:-none} == none ]] || known=1
        [[ ${fact[$i,state]:-} == running ]] && running=1 || asked_to_end=''
        if [[ ${fact[$i,failed]:-} ]]; then failed=1; else reached+=("$i"); fi
    done
    [[ $known || $failed == 1 ]] || no_such_run
    [[ ! $now ]] || asked_to_end=''
    [[ $asked_to_end || $now || ! $running ]] ||
        echo "$name: not every host of it runs, so it cannot save and is not asked to"
    asked=("${reached[@]}")
    if ((${#asked[@]})); then
        speaker=${hosts[asked[0]]}
        on_hosts host_stop $((grace + ${KILL_GRACE_SECONDS:-30} + 2 * ${SSH_SECONDS:-60}))
        gather host_stop
    fi
    for i in "${!complaints[@]}"; do
        echo "launch.sh: NOT stopped: ${accused[i]}: ${complaints[i]}"
    done >&2
    ((!${#complaints[@]}))
}

host_stop() {
    local -A sent=()
    local pids pid command request signal=TERM deadline
    if [[ ${only:-} ]]; then # a start was given up: one that is still on its way must not begin
        mkdir -p "$run_dir"
        exec 8> "$run_dir/.lock"
        flock -w 10 8 && echo "$run_id" > "$run_dir/given_up"
        exec 8>&-
        [[ $(host_id) == "$run_id/$host" ]] || return 0
    fi
    [[ $(host_processes) ]] || { echo "$name on $host: not running"; return; }
    request=$(< "$run_dir/save_dir")/$name/stop-requested
    # a run that has an exit code ended before this, and only leftovers are removed
    if [[ ! -e $run_dir/exit_code ]]; then
        touch "$run_dir/stopped"
        [[ ! $asked_to_end ]] || host_ask_to_end
    fi
    deadline=$((SECONDS + ${KILL_GRACE_SECONDS:-30}))
    while pids=$(host_processes); [[ $pids ]]; do
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
        for pid in $pids; do # looking through /proc again costs more than looking at these
            while [[ -e /proc/$pid && ${sent[$pid]:-} ]] && ((SECONDS < deadline)); do sleep 0.1; done
        done
        sleep 0.1
        ((SECONDS < deadline)) || signal=KILL
        ((SECONDS < deadline + 30)) || { host_say fail "SIGKILL did not end ${pids//$'\n'/ }"; exit 3; }
    done
    rm -f "$request"
    echo "$name on $host: no process of it is left"
}

host_ask_to_end() {
    local deadline=$((SECONDS + grace)) told=$SECONDS
    mkdir -p "$(dirname "$request")"
    touch "$request"
    [[ $host != "$speaker" ]] ||
        echo "$name: asked to save and end at its next step; waiting up to $grace s (stop --now does not ask)"
    while [[ ! -e $run_dir/exit_code && $(host_processes) ]] && ((SECONDS < deadline)); do
        sleep 0.5
        if [[ $host == "$speaker" ]] && ((SECONDS >= told + 10)); then
            told=$SECONDS
            echo "$name: $(host_step), waiting up to $((deadline - SECONDS)) s more"
        fi
    done
    [[ ! -e $run_dir/exit_code ]] || sleep 0.5 # run.sh is about to end
    [[ -e $run_dir/exit_code ]] || echo "$name on $host: did not end within $grace s"
}

# A shell inside the tmux of a run carries its id: drop it, or stop would end itself.
[[ ! -v TRAIN_LLM_RUN_ID ]] || exec env -u TRAIN_LLM_RUN_ID bash "$0" "$@"
called_from=$PWD
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")"
main "$@"
