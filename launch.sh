#!/usr/bin/env bash
# Usage: bash launch.sh [check|start|status|logs|errors|stop] [LAUNCHER OPTIONS] [-- OPTIONS...]
#
#   start   check, then start train_llm.py with torchrun in tmux on every host: all of them or none;
#           return when it runs (the default)
#   check   look at every host, list all that is wrong, each with its remedy; start nothing
#   status  each host: running, finished, failed or stopped, its last step and the age of that; exit
#           status 0 unless something failed
#   logs    copy every host's logs to logs/NAME/HOST/ here, show them as they grow, until it ends
#   errors  which rank failed first, with its last lines, and which were only ended because of it
#   stop    ask the run to save and end, wait for that, then end every process it started
#
#   --hosts FILE                 hosts, one a line: name, user@name, name:port, alias of ssh_config,
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
#   --force                      start: start although the check failed, say what was overridden
#   --now                        stop: do not ask the run to save first
#
# Environment: PYTHON (the interpreter, at the same path on every host; default: python on PATH),
# SSH_SECONDS (60: the longest one question to one host may take; the trainer's own check may take
# ten times that), STOP_GRACE_SECONDS (300: how long stop waits for the run to end; what a save
# takes does not count), KILL_GRACE_SECONDS (30: how long SIGTERM may take before SIGKILL). On
# localhost the whole environment reaches the run; other hosts get HF_*, NCCL_*, GLOO_*, PYTORCH_*,
# TORCH_*, OMP_NUM_THREADS and what --env names. The project lies at the same path on every host,
# and paths among the OPTIONS are relative to it. Output goes to logs/NAME/HOST/, results to
# outputs/NAME/, on the disks of the hosts.

set -euo pipefail

# What `bash launch.sh` trains when no model is named; OPTIONS come after these, and the last wins.
demo_recipe=(
    --model-name demo/model --dataset-name demo/corpus.jsonl
    --seq-length 256 --max-steps 350
    --lr 5e-3 --warmup-steps 20 --log-freq 5
)

abort() { echo "launch.sh: $*" >&2; exit 1; }
refuse() { echo "launch.sh: $* (bash launch.sh -h tells the usage)" >&2; exit 2; }

# --- 1. What is asked -------------------------------------------------------------------
# Before `--` stand the launcher's own options, after it those of train_llm.py, passed on as they
# are. The launcher reads a few of them (experiment, model, output folder) and changes none.

main() {
    verb=start name='' ranks='' port='' max_restarts='' hosts_file='' options=() environment=()
    dry_run='' force='' now='' given='' sources=()
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
    patience=${SSH_SECONDS:-60} grace=${STOP_GRACE_SECONDS:-300}
    kill_grace=${KILL_GRACE_SECONDS:-30}
    [[ $patience.$grace.$kill_grace =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] ||
        refuse "SSH_SECONDS, STOP_GRACE_SECONDS and KILL_GRACE_SECONDS must be whole seconds"
    read_hosts
    asked=("${!hosts[@]}")
    trap hang_up EXIT
    "$verb"
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
    # the demo's batch is for as many processes as there are, unless a batch is named
    sized=$demo
    if option batch-size > /dev/null || option global-batch-size > /dev/null; then sized=''; fi
    [[ ! $demo ]] || options=("${demo_recipe[@]}" "${options[@]}")
    options=(--experiment-name "$name" "${options[@]}")
    save_dir=$(option save-dir) || save_dir=outputs
    model=$(option model-name) data=$(option dataset-name) rows_dir=$(option rows-dir) || true
    [[ -e $data ]] || data=${data%=*}  # of several data sets the first, without its share
}

# Logs are filed under the host as the file spells it, not under its hostname: that file alone then
# tells where to look, and two machines that believe they have the same name stay apart. A start
# notes its hosts in logs/NAME/run, for the other verbs: `hosts` may change while a run goes on.
read_hosts() {
    local line number=0 place places=' '
    local pattern='^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*(:[1-9][0-9]{0,4})?$'
    hosts=() first_ranks=() addresses=() skews=() run_id=''
    local record=logs/$name/run
    if [[ $verb != start && $verb != check && ! $hosts_file && -s $record ]]; then
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
        [[ $place =~ $pattern ]] ||
            abort "$hosts_file, line $number, is no host: '$line';" \
                "write name, user@name or name:port"
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
# A host may be dead, or hang after it let us in, and must not keep the others waiting; and what
# costs is connecting, a dozen messages to and fro. So all hosts are called at once, each over one
# connection for all that a verb asks, one order after another: a function `host_...` of this file.
# An answer is lines of KEY, tab, TEXT and a last line `done`; who has not said that in time is
# given up. The functions, and the variables they read, travel over the standard input of ssh: none
# of it (secrets, quotes, newlines) is on a command line, and it runs only when it arrived whole.

# call_hosts SECONDS: opens a connection to each of the `asked` hosts, which lasts that long at most
call_hosts() {
    local i variable fd
    hang_up
    work=$(mktemp -d)
    # shellcheck disable=SC2016
    script=$(
      # the empty line ends what .bashrc began, as a window's title
      echo '{ echo; echo "clock ${EPOCHREALTIME/,/.}"'
      for variable in $(compgen -e |
          grep -E '^(HF_|NCCL_|GLOO_|PYTORCH_|TORCH_)|^OMP_NUM_THREADS$') "${environment[@]}"
      do printf 'export %s=%q\n' "$variable" "${!variable}"; done
      declare -p name hosts options save_dir model data rows_dir demo sized sources max_restarts \
          port grace kill_grace run_id PYTHON
      # shellcheck disable=SC2046
      declare -f $(compgen -A function host_)
      printf 'cd %q || { host_say fail there is no folder %q, copy the project there; exit 3; }\n' \
          "$PWD" "$PWD"
      echo '[[ ${EPOCHREALTIME:-} ]] || { host_say fail "has bash $BASH_VERSION; bash 5 or newer' \
          'is needed"; exit 3; }'
      echo 'while IFS= read -r order; do (set -euo pipefail; eval "$order") < /dev/null 2>&1'
      echo 'host_say done $?; done; }')
    size=$(LC_ALL=C; echo ${#script}) # in bytes
    mkfifo "$work/answers" "${asked[@]/#/$work/to.}"
    set -m # a process group for all connections: they are ended as a whole
    (set +m; for i in "${asked[@]}"; do connect "$i" "$1" & done; wait) > "$work/answers" 9>&- &
    group=$!
    set +m
    disown
    exec {answers}< "$work/answers"
    for i in "${asked[@]}"; do
        exec {fd}<> "$work/to.$i"
        to[i]=$fd
    done
}

connect() { # I SECONDS
    local host=${hosts[$1]} at_port=() code=0 run="eval \"\$(head -c $size)\""
    if [[ $host == localhost ]]; then set -- "$1" bash -c "$run"; else
        [[ $host != *:* ]] || at_port=(-p "${host##*:}")
        set -- "$1" ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 \
            -o ServerAliveCountMax=3 "${at_port[@]}" -- "${host%:*}" \
            "exec timeout -k 5 $2 bash -c '$run'"
    fi
    { "${@:2}" < <(printf '%s' "$script"; exec cat "$work/to.$1") 2>&1 || code=$?
      printf '\ngone\t%d\n' "$code"; } | read_answers "$1"
}

# Puts the number of the host before its lines, and the time of arrival behind the host's clock.
# What is no answer (a greeting of .bashrc, a program's complaint, ssh's) has the key `said`.
read_answers() { # I
    local line started=''
    while IFS= read -r line || [[ $line ]]; do
        line=${line%$'\r'}
        if [[ $line == clock\ * ]]; then
            started=1
            printf '%d\tclock\t%s %s\n' "$1" "${line#clock }" "${EPOCHREALTIME/,/.}"
        elif [[ $line == gone$'\t'* || ( $started && $line == [[:alnum:]_.]*$'\t'* ) ]]; then
            if [[ $line == log$'\t'* ]]; then receive_log "$1" "${line#*$'\t'}"
            else printf '%d\t%s\n' "$1" "${line:0:1000}"; fi # a pipe keeps 4096 bytes together
        elif [[ $line == *[![:space:]]* ]]; then printf '%d\tsaid\t%s\n' "$1" "${line:0:1000}"; fi
    done
}

hang_up() {
    local fd
    [[ ! $group ]] || kill -- "-$group" 2> /dev/null || true
    for fd in "${to[@]}"; do exec {fd}>&-; done
    [[ ! $answers ]] || exec {answers}<&-
    rm -rf "$work"
    to=() group='' answers='' work=''
}
to=() group='' answers='' work=''

# on_hosts FUNCTION SECONDS: the `asked` hosts run it; returns when all are done or given up. If one
# cannot start, the others wait for it in vain, and nobody waits for them.
on_hosts() {
    local i key text left line waiting=' ' deadline=$((EPOCHSECONDS + $2)) variable
    local number host address first_rank interface run_dir
    for i in "${asked[@]}"; do
        if [[ ! ${to[i]:-} ]]; then blame "$i" "${dropped[i]}"; continue; fi
        number=$i host=${hosts[i]} address=${addresses[i]} first_rank=${first_ranks[i]}
        interface=${fact[$i,interface]:-} run_dir=logs/$name/$host
        { for variable in number host address first_rank interface run_dir ranks rendezvous \
              processors speaker asked_to_end only start_by save_ranks
          do printf '%s=%q ' "$variable" "${!variable:-}"; done
          [[ $1 != host_follow ]] || find_offsets
          echo "; $1"; } >&"${to[i]}"
        waiting+="$i "
    done
    while [[ $waiting != ' ' ]]; do
        left=$((deadline - EPOCHSECONDS))
        ((left > 0)) || break
        read -r -t "$left" line <&"$answers" || break # no IFS here: a trap would run with it
        i=${line%%$'\t'*} text=${line#*$'\t'} key=${text%%$'\t'*}
        text=${text#"$key"} text=${text#$'\t'}
        hear "$i" "$key" "$text"
        [[ $key != saves ]] || deadline=$((EPOCHSECONDS + $2))
        [[ $key != "done" && $key != gone ]] || waiting=${waiting/ $i / }
        [[ $1 != host_start || ! ${fact[$i,failed]:-} || $key == fail ]] || return 0
    done
    for i in $waiting; do lose "$i" "$too_late"; done
}

too_late='gave no answer in time; look at it, or set SSH_SECONDS higher'
declare -A fact=() # what hosts said, by I,KEY
dropped=() failures=()
hear() { # I KEY TEXT
    local said=${fact[$1,said]:-nothing}
    case $2 in
        fail) blame "$1" "$3" ;;
        warn) warnings+=("${hosts[$1]}: $3") ;;
        say) echo "$3" ;;
        plan) fact[$1,plan]+=$3$'\n' ;;
        failure) failures+=("$1"$'\t'"$3") ;;
        tail) fact[$1,tail,${3%%$'\t'*}]+="  ${3#*$'\t'}"$'\n' ;;
        done) [[ $3 == 0 || $3 == 3 ]] || blame "$1" "answered with exit code $3: $said" ;;
        gone)
            case $3 in
                0 | 3) lose "$1" "broke off: $said" ;;
                124 | 137) lose "$1" "$too_late" ;;
                255) lose "$1" "ssh cannot connect without a password: $said; make" \
                    "\`ssh -o BatchMode=yes HOST true\` work" ;;
                *) lose "$1" "answered with exit code $3: $said" ;;
            esac ;;
        *) fact[$1,$2]=$3 ;;
    esac
}

lose() { # I WHY
    local fd=${to[$1]:-}
    [[ ! $fd ]] || exec {fd}>&-
    unset "to[$1]"
    dropped[$1]="${*:2}"
    # who has answered and whose time is over while others hang is missed by the next order only
    [[ ${fact[$1,failed]:-} || $waiting != *" $1 "* ]] || blame "$@"
}

# blame I TEXT: a complaint about a host; the same one about many hosts is told once.
complaints=() accused=() warnings=()
blame() {
    local k text="${*:2}"
    fact[$1,failed]=1
    for k in "${!complaints[@]}"; do
        [[ ${complaints[k]} != "$text" ]] || { accused[k]+="$1 "; return 0; }
    done
    complaints+=("$text") accused+=(" $1 ")
}

tell_complaints() { # [PREFIX]; fails if there is one
    local k i names
    for k in "${!complaints[@]}"; do
        names=''
        for i in "${!hosts[@]}"; do # in the order of the file, not of the answers
            [[ ${accused[k]} != *" $i "* ]] || names+="${names:+, }${hosts[i]}"
        done
        echo "launch.sh: ${1:-}$names: ${complaints[k]}" >&2
    done
    ((!${#complaints[@]}))
}

# --- 3. Check ---------------------------------------------------------------------------
# Sixty-four hosts rarely agree by themselves, and torchrun tells of a disagreement after minutes or
# by hanging. So every host is asked twice before a start: what it is (host_look), and, knowing its
# rank, whether the trainer and the rendezvous would work on it (host_try). Everything found is told
# together. Cost: half a minute, most of it spent importing torch.

check() {
    find_python
    look_at_hosts
    ((${#complaints[@]} == 0)) || refuse_to_start
    echo "$name can start: ${#hosts[@]} host(s) of $ranks $processors process(es)"
}

refuse_to_start() {
    tell_complaints || true
    echo "launch.sh: options refused or hosts not ready; nothing was started" >&2
    exit "$refusal"
}

find_python() {
    PYTHON=${PYTHON:-$(command -v python || command -v python3)} ||
        abort "no python on PATH: activate the environment, or set PYTHON=/path/to/python"
    PYTHON=$(type -P "$PYTHON") || abort "PYTHON=$PYTHON is no program"
}

look_at_hosts() {
    local i
    refusal=1
    look_where_it_ran
    run_id=$name-$(< /proc/sys/kernel/random/uuid)
    mapfile -t sources < <(find . -maxdepth 1 -name '*.py' ! -name top-cluster.py -printf '%f\n')
    find_rendezvous
    call_hosts $((13 * patience))
    on_hosts host_look "$patience"
    compare_hosts
    order_ranks
    sort_paths
    for i in "${asked[@]}"; do # what has no Python or no project cannot try it
        [[ ${fact[$i,gpus]:-}${fact[$i,failed]:-} ]] ||
            blame "$i" "$PYTHON breaks off with exit code ${fact[$i,broke_off]:-0} and says" \
                "${fact[$i,said]:-nothing}; try there: $PYTHON -c 'import torch'"
        [[ ${fact[$i,gpus]:-} && ${to[i]:-} ]] || unset "asked[$i]"
    done
    on_hosts host_try $((10 * patience))
    unite_weights
    for i in "${asked[@]}"; do
        [[ ! ${fact[$i,unreachable]:-} || ${fact[0,taken]:-} ]] ||
            blame "$i" "${fact[$i,unreachable]}"
        [[ ${fact[$i,refused]:-} != 2 ]] || refusal=2
    done
    asked=("${!hosts[@]}")
    tell_hosts
}

# `hosts` may have changed since a start of this name; the others are asked by the check itself. Two
# runs of one name would write, and delete, the same checkpoints.
look_where_it_ran() {
    local host state elsewhere=' '
    [[ -s logs/$name/run ]] || return 0
    while read -r host _; do
        [[ " ${hosts[*]} " == *" $host "* ]] || elsewhere+="$host "
    done < <(tail -n +2 "logs/$name/run")
    [[ $elsewhere != ' ' ]] || return 0
    while read -r _ _ host state; do
        host=${host%:}
        [[ $elsewhere == *" $host "* ]] || continue
        [[ $state != "not to be reached" ]] ||
            warnings+=("$host: cannot be reached; $name was started there and may still run")
        host_is_live "${state%%,*}" && [[ ! $force ]] &&
            abort "$name still runs on $host, which is no longer among the hosts; end it first:" \
                "bash launch.sh stop --name $name"
    done < <(bash launch.sh status --name "$name" 2> /dev/null)
    return 0
}

# The address of the first host, as this machine resolves it. Its own name may mean 127.0.1.1 to
# itself; then, and for localhost, it is the address from which the next host would be reached.
find_rendezvous() {
    local i next
    rendezvous=localhost
    ((${#hosts[@]} > 1)) || return 0
    command -v ip > /dev/null || abort "ip is needed for several hosts: apt-get install iproute2"
    rendezvous=$(address_of 0)
    for ((i = 1; i < ${#hosts[@]}; i++)); do
        [[ $rendezvous == 127.* ]] || return 0
        next=$(address_of "$i")
        rendezvous=$(ip -4 route get "$next" | sed -nE '1s/.* src ([0-9.]+).*/\1/p')
    done
    [[ $rendezvous != 127.* ]] || abort "${hosts[*]} all mean this machine; name it once"
}

address_of() {
    local host=${hosts[$1]} found
    if [[ $host == localhost ]]; then echo 127.0.0.1; return; fi
    found=$(ssh -T -G -- "${host%:*}" | sed -n 's/^hostname //p') ||
        abort "ssh cannot read its config"
    getent ahostsv4 "$found" | sed -n '1s/ .*//p' | grep . ||
        abort "$host: $found has no IPv4 address here; name it in /etc/hosts, or write its address"
}


compare_hosts() {
    local i key theirs ours first='' clock arrival skew other
    processors=CPU
    for i in "${asked[@]}"; do
        [[ ${fact[$i,gpus]:-} ]] || continue
        read -r clock arrival <<< "${fact[$i,clock]}"
        # in milliseconds; an answer's travel counts
        skew=$(((10#${clock/./} - 10#${arrival/./}) / 1000))
        skews[i]=$skew addresses[i]=${fact[$i,address]:-}
        if ((skew > 5000 || skew < -5000)); then
            blame "$i" "its clock is $(seconds "$skew") s off this machine's, and torchrun drops" \
                "nodes whose clocks differ; set the time: timedatectl set-ntp true"
        elif ((skew > 1000 || skew < -1000)); then
            warnings+=("${hosts[i]}: its clock is $(seconds "$skew") s off this machine's")
        fi
        if [[ $ranks == gpu && ${fact[$i,gpus]} == 0 ]]; then
            blame "$i" "has no GPU that torch sees; use --nproc-per-node auto, or mend the driver"
        elif [[ $ranks =~ ^[0-9]+$ && ${fact[$i,gpus]} != 0 && $ranks -gt ${fact[$i,gpus]} ]]; then
            blame "$i" "--nproc-per-node $ranks is more than its ${fact[$i,gpus]} GPUs"
        fi
        if [[ ! $first ]]; then first=$i; continue; fi
        for key in "${sources[@]}" python torch cuda nccl transformers driver gpus; do
            theirs=${fact[$i,$key]:-none} ours=${fact[$first,$key]:-none}
            [[ $theirs != "$ours" ]] || continue
            case $key in
                *.py) blame "$i" "has another $key than ${hosts[first]}; copy the project there" \
                    "again" ;;
                gpus) blame "$i" "has $theirs GPUs, ${hosts[first]} has $ours; all hosts need the" \
                    "same number" ;;
                *) blame "$i" "has $key $theirs, ${hosts[first]} has $ours; install the same" ;;
            esac
        done
        for other in "${asked[@]}"; do
            [[ $other -lt $i && ${addresses[i]} && ${addresses[other]} == "${addresses[i]}" ]] ||
                continue
            blame "$i" "has the address ${addresses[i]} of ${hosts[other]}: the same machine" \
                "under two names; remove one"
        done
    done
    [[ $first ]] || return 0
    [[ ${fact[$first,gpus]} == 0 ]] || processors=GPU
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
    done < <(for i in "${!hosts[@]}"; do echo "${addresses[i]:-~} $i"; done |
        LC_ALL=C sort -s -k1,1)
}

# Which paths are one place for all hosts? On a shared disk a file has the same number and the same
# time of its last change, to the nanosecond, whoever looks; on two disks never both.
sort_paths() {
    local i path count missing kind here
    local -A places=() listed=()
    shared_logs=1 save_ranks=$ranks paths=()
    here=$(stat -Lc '%i %.9Z' logs 2> /dev/null) || true
    for i in "${asked[@]}"; do
        [[ ${hosts[i]} == localhost || ${fact[$i,path logs]:-} == "$here" ]] || shared_logs=''
    done
    for path in logs "$save_dir" "$model" "$data" "$rows_dir" HF_HOME; do
        [[ $path && ! ${listed[$path]:-} ]] || continue
        listed[$path]=1 missing='' places=()
        for i in "${asked[@]}"; do
            if [[ ${fact[$i,path $path]:-} ]]; then places[${fact[$i,path $path]}]=1
            else missing+=" ${hosts[i]}"; fi
        done
        count=${#places[@]} kind='shared by some hosts'
        ((count)) || continue
        ((count < ${#asked[@]})) || kind="each host's own"
        ((count > 1)) || kind=shared
        [[ $path != "$save_dir" || $kind != shared || ! $ranks =~ ^[0-9]+$ ]] ||
            save_ranks=$((ranks * ${#hosts[@]}))
        paths+=("$path: $kind${missing:+, not there on$missing}")
    done
}

# Where each host may have a part of the weights, together they need all. Each tells what it has:
# see `check` of weights.py. Rank 0's host tells nothing if it wants none, or all for itself.
unite_weights() {
    local i k told together='' nowhere=() hoped=1
    [[ ${fact[$rank_0,weights]:-} ]] || return 0
    for i in "${!hosts[@]}"; do
        [[ ! ${fact[$i,failed]:-} ]] || return 0 # it may have what the others lack
        told=${fact[$i,weights]:-}
        [[ $told != - ]] || hoped=''
        [[ $told == [01x]* ]] || continue
        : "${together:=$told}"
        for ((k = 0; k < ${#together}; k++)); do
            [[ ${told:k:1} != 1 ]] || together=${together:0:k}1${together:k+1}
            [[ ${told:k:1} != x ]] || blame "$i" "of its files of weights, by name, number" \
                "$((k + 1)) is cut short; copy or fetch it again"
        done
    done
    [[ $together || $hoped ]] || blame "$rank_0" "no host has weights of $model; copy or fetch" \
        "them, or start without them with --random-init"
    for ((k = 0; k < ${#together}; k++)); do
        [[ ${together:k:1} != 0 ]] || nowhere+=($((k + 1)))
    done
    ((!${#nowhere[@]})) || blame "$rank_0" "no host has ${#nowhere[@]} of the ${#together} files" \
        "of weights, the first by name is number ${nowhere[0]}; fetch them with download.py"
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
    ((${#hosts[@]} > 1)) || return 0
    ((!${#paths[@]})) || printf '  disks      %s\n' "$(printf '%s; ' "${paths[@]}" | sed 's/; $//')"
    echo "rank 0, which writes metrics.jsonl, is on ${hosts[rank_0]}" \
        "${addresses[rank_0]:+(${addresses[rank_0]}, the first of the sorted addresses)}"
}

about_host() {
    if [[ ${fact[$1,gpus]} == 0 ]]; then printf 'CPU only'
    else printf '%s x %s' "${fact[$1,gpus]}" "${fact[$1,gpu]:-GPU}"; fi
    ((${#hosts[@]} == 1)) || printf ', %s on %s, clock %s s' "${addresses[$1]}" \
        "${fact[$1,interface]:-?}" "$(seconds "${skews[$1]}")"
    printf ', torch %s, free: logs %s GiB, %s %s GiB\n' "${fact[$1,torch]:-?}" \
        "${fact[$1,logs_gib]:-?}" "$save_dir" "${fact[$1,save_gib]:-?}"
}

host_say() { printf '%s\t%s\n' "$1" "${*:2}"; }

host_look() {
    local tool missing='' file sum pids
    for tool in tmux flock timeout sha256sum; do
        command -v "$tool" > /dev/null || missing+=" $tool"
    done
    ((${#hosts[@]} == 1)) || command -v ip > /dev/null || missing+=" iproute2"
    [[ ! $missing ]] || host_say fail "lacks$missing: apt-get install$missing"
    host_find_processes
    ((!${#pids[@]})) || host_say fail "$name is already running; give another --name, or:" \
        "bash launch.sh stop --name $name"
    for file in "${sources[@]}"; do
        [[ -e $file ]] || host_say fail "has no $PWD/$file; copy the project there"
    done
    while read -r sum file; do host_say "$file" "$sum"; done < <(
        sha256sum "${sources[@]}" 2> /dev/null)
    host_disks
    host_limits
    ((${#hosts[@]} == 1)) || host_network
    if command -v nvidia-smi > /dev/null; then host_gpus; fi
    host_packages # last: who says how many GPUs there are got as far as this
}

host_disks() {
    local save=$save_dir home=${HF_HOME:-$HOME/.cache/huggingface} mib path place
    [[ -d logs ]] || mkdir -p logs || {
        host_say fail "cannot make $PWD/logs; give this user the right to"
        return 0
    }
    until [[ -d $save ]]; do # the nearest folder that is there
        case $save in ?*/*) save=${save%/*} ;; /*) save=/ ;; *) save=. ;; esac
    done
    mapfile -t mib < <(df --block-size=1M --output=avail logs "$save" /dev/shm 2> /dev/null)
    host_say logs_gib $((mib[1] / 1024))
    host_say save_gib $((mib[2] / 1024))
    ((mib[1] >= 1024)) || host_say fail "has less than 1 GiB free in logs; make room"
    ((mib[2] >= 1024)) || host_say fail "has less than 1 GiB free in $save; make room"
    ((${mib[3]:-0} >= 512)) || host_say fail "has $((mib[3])) MiB free in /dev/shm, NCCL wants" \
        "512; in Docker: --shm-size 1g, else: mount -o remount,size=1g /dev/shm"
    while IFS=$'\t' read -r path place; do
        [[ $path != "$save" ]] || host_say "path $save_dir" "$place"
        [[ $path != "$home" ]] || host_say "path HF_HOME" "$place"
        host_say "path $path" "$place"
    done < <(stat -L --printf '%n\t%i %.9Z\n' -- \
        logs "$save" "$model" "$data" "$rows_dir" "$home" 2> /dev/null)
}

host_limits() {
    local files memory
    files=$(ulimit -Hn) # run.sh raises the soft limit to it
    [[ $files == unlimited ]] || ((files >= 4096)) ||
        host_say fail "may open $files files at once (ulimit -Hn), training wants 4096; raise" \
            "nofile in /etc/security/limits.conf"
    memory=$(ulimit -Hl)
    [[ $memory == unlimited || ! -e /sys/class/infiniband ]] || ((memory > 1 << 26)) ||
        host_say fail "has InfiniBand, but may lock $memory KiB of memory (ulimit -Hl); set" \
            "memlock unlimited in /etc/security/limits.conf"
}

host_network() {
    local own='' source='' interface='' route=' dev ([^ ]+) .*src ([0-9.]+)'
    read -r own _ < <(getent ahostsv4 "${HOSTNAME:=$(uname -n)}") || true
    [[ $own != 127.* ]] || host_say warn "its name $HOSTNAME means $own to itself; harmless here," \
        "where addresses are given"
    [[ ! $(ip -4 route get "$rendezvous" 2> /dev/null) =~ $route ]] ||
        interface=${BASH_REMATCH[1]} source=${BASH_REMATCH[2]}
    [[ $source && $source != 127.* ]] || {
        host_say fail "has no route to the rendezvous host $rendezvous; ask: ip route get" \
            "$rendezvous"
        return 0
    }
    # the way to itself is the loopback: ask whose the address is
    [[ $interface != lo ]] || read -r _ interface _ < <(ip -4 -o addr show to "$source")
    host_say address "$source"
    host_say interface "${interface%%@*}"
}

host_gpus() {
    local line='' index name driver ecc used pid program busy='' query
    query=index,name,driver_version,ecc.errors.uncorrected.volatile.total,memory.used
    while IFS=$'\t' read -r index name driver ecc used; do
        [[ $index =~ ^[0-9]+$ ]] || { host_say fail "nvidia-smi says: $index"; continue; }
        ((index)) || { host_say driver "$driver"; host_say gpu "$name"; }
        [[ $ecc != [1-9]* ]] ||
            host_say fail "GPU $index has $ecc uncorrected ECC errors; reset or replace it"
        [[ ! $used =~ ^[0-9]+$ ]] || ((used <= 1024)) || busy+=" $index ($used MiB)"
    done < <(nvidia-smi --format=csv,noheader,nounits --query-gpu="$query" | sed 's/, /\t/g')
    while IFS=$'\t' read -r pid program; do
        line+=" $pid of $(ps -o user= -p "$pid" 2> /dev/null || echo another container) ($program)"
    done < <(nvidia-smi --format=csv,noheader --query-compute-apps=pid,process_name 2> /dev/null |
        sed 's/, /\t/')
    if [[ $line ]]; then
        host_say fail "its GPUs are used by process$line; end them, or take other hosts"
    elif [[ $busy ]]; then
        host_say fail "memory is in use on GPU$busy, by no process seen here; look for another" \
            "container"
    fi
    query=remapped_rows.pending,remapped_rows.failure
    ! nvidia-smi --format=csv,noheader --query-remapped-rows="$query" 2> /dev/null |
        grep -Eq '(^|, )(Yes|[1-9])' ||
        host_say fail "a GPU waits for a row remapping, or one failed; reset or replace it"
    line=$(dmesg 2> /dev/null | grep 'NVRM: Xid' | tail -n 1) || true
    [[ ! $line ]] || host_say warn "the driver reported since boot: $line"
}

host_packages() {
    [[ -x $PYTHON ]] || {
        host_say fail "has no $PYTHON; make the same Python environment at the same path"
        return 0
    }
    { "$PYTHON" - 2>&1 << 'EOF' || host_say broke_off $?
import importlib.metadata, importlib.util, sys
needed = ("torch", "transformers", "datasets", "huggingface_hub", "tqdm")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
remedy = f"run: {sys.executable} -m pip install -r requirements.txt"
if missing:
    sys.exit(f"fail\t{sys.executable} lacks {', '.join(missing)}; {remedy}")
try:
    import torch
except Exception as error:
    sys.exit(f"fail\ttorch cannot be imported ({error}); {remedy}")
print(f"python\t{' '.join(sys.version.split())}\ntorch\t{torch.__version__}")
print(f"nccl\t{torch.cuda.nccl.version() if torch.cuda.is_available() else None}")
print(f"cuda\t{torch.version.cuda}\ntransformers\t{importlib.metadata.version('transformers')}")
print(f"gpus\t{torch.cuda.device_count()}")
EOF
    } 2> /dev/null # bash would quote all this if Python crashed
}

# The demo's step has eight rows, or as many more as all processes take alike.
host_size_demo() {
    local all each
    sizes=()
    [[ $sized && $ranks =~ ^[0-9]+$ ]] || return 0
    all=$((${#hosts[@]} * ranks)) each=$(((8 + all - 1) / all))
    sizes=(--batch-size "$each" --global-batch-size $((each * all)))
}

# LOCAL_WORLD_SIZE tells the trainer how many ranks' part of a checkpoint this disk must hold.
host_try() {
    local said code=0 port_test='' sizes
    host_size_demo
    if ((${#hosts[@]} > 1)); then host_test_port & port_test=$!; fi
    if [[ $demo ]] && ! said=$("$PYTHON" download.py --demo 2>&1); then
        host_say fail "download.py --demo failed: $(tail -n 1 <<< "$said")"
    elif said=$(WORLD_SIZE=$((${#hosts[@]} * ranks)) RANK=$first_rank LOCAL_WORLD_SIZE=$save_ranks \
        GROUP_WORLD_SIZE=${#hosts[@]} "$PYTHON" train_llm.py --check "${sizes[@]}" \
        "${options[@]}" 2>&1); then
        if [[ $said == *$'\nweights-here '* ]]; then
            host_say weights "${said##*$'\nweights-here '}"
            said=${said%$'\nweights-here '*}
        fi
        printf 'plan\t%s\n' "${said//$'\n'/$'\n'plan$'\t'}"
    else
        code=$?
        host_say refused "$code"
        said=$(grep -v '^\s*$' <<< "$said" | tail -n 1) || true
        host_say fail "${said:-train_llm.py --check left with status $code and no word}"
    fi
    [[ ! $port_test ]] || wait "$port_test"
}

# The first host listens on the rendezvous port until every other was there, each tries to reach it.
host_test_port() {
    local holder
    "$PYTHON" - "$number" "$rendezvous" "$port" "$run_id" "$host" "${#hosts[@]}" << 'EOF' &&
import contextlib, socket, sys, time
number, address, port, token, host, hosts = sys.argv[1:]
token, port, deadline = token.encode(), int(port), time.monotonic() + 8
if number == "0":
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
        server = socket.create_connection((address, port), timeout=3)
    except OSError as error:
        why = str(error)
        time.sleep(0.3)
        continue
    why = "another program answers"
    with contextlib.suppress(OSError):
        server.sendall(host.encode())
        if server.recv(200) == token:
            sys.exit()
    break
print(f"unreachable\tcannot reach the rendezvous at {address}:{port} ({why}); open that port, or"
      " name another with --port")
EOF
        return 0
    ((number == 0)) || return 0
    holder=$(ss -Hltnp "sport = :$port" 2> /dev/null |
        sed -nE '1s/.*users:\(\("([^"]+)",pid=([0-9]+).*/ by \1, process \2/p') || true
    host_say fail "port $port, for the rendezvous, is taken$holder; give another --port"
}

# --- 4. Start ---------------------------------------------------------------------------
# A run must outlive this shell, and what it was told must arrive unchanged. So on each host a
# generated script holds the command, and a tmux server of this run alone runs it (a server passes
# on the environment that its *first* session came with). Half a run is worse than none: if one host
# does not start, or this shell is interrupted, the others are stopped again.

start() {
    local i
    find_python
    mkdir -p logs
    exec 9> logs/.lock # one start at a time: a second one waits, then finds the name taken
    flock 9
    look_at_hosts
    [[ ! $dry_run ]] || dry_run
    if ((${#complaints[@]})); then
        [[ $force ]] || refuse_to_start
        echo "launch.sh: started in spite of this, because of --force:" >&2
        tell_complaints || true
        [[ $ranks =~ ^[0-9]+$ ]] || abort "no host can be started"
    fi
    mkdir -p "logs/$name"
    { echo "run $run_id"
      for i in "${!hosts[@]}"; do
          echo "${hosts[i]} ${first_ranks[i]} ${addresses[i]:--} ${skews[i]}"
          unset "fact[$i,failed]" # from here on: to start
      done; } > "logs/$name/run"
    complaints=() accused=()
    trap 'exec &> /dev/null; kill "$$"' HUP # the terminal is gone, and nobody to be told
    trap 'trap "" INT TERM HUP; echo "launch.sh: interrupted" >&2; take_back; exit 130' INT TERM
    start_by=$((EPOCHSECONDS + patience + 6)) # what arrives later at a host was given up here
    on_hosts host_start "$patience"
    tell_complaints || { take_back; exit 1; }
    tell_started
}

take_back() {
    echo "launch.sh: not every host started, so what did start is stopped" >&2
    complaints=() accused=() speaker='' asked_to_end='' only=1 # this very run, none before it
    call_hosts $((2 * patience + kill_grace))
    on_hosts host_stop $((2 * patience + kill_grace)) >&2
    tell_complaints "when it answers again: bash launch.sh stop --name $name; NOT stopped: " || true
}

dry_run() {
    local i
    for i in "${!hosts[@]}"; do
        host=${hosts[i]} address=${addresses[i]} run_dir=logs/$name/${hosts[i]} number=$i
        host_torchrun
        printf '%s:' "$host"
        printf ' %q' "${torchrun[@]}"
        printf '\n  with PYTHON=%s and the variables %s\n' "$PYTHON" \
            "${environment[*]:-of this shell}"
    done
    ((${#complaints[@]} == 0)) || refuse_to_start
    exit 0
}

tell_started() {
    local i over=1
    for i in "${!hosts[@]}"; do [[ ${fact[$i,exit_code]:-} ]] || over=''; done
    if [[ $over ]]; then status; return; fi
    echo "$name: $ranks $processors process(es) started on ${#hosts[@]} host(s): ${hosts[*]}"
    [[ $PWD == "$called_from" ]] || echo "in $PWD:"
    if [[ $shared_logs ]]; then echo "  follow:  find logs/ -name \\*stderr.log | xargs tail -f"
    else echo "  follow:  bash launch.sh logs --name $name    (they lie on the hosts' disks)"; fi
    printf '  watch:   python top-cluster.py %q%s\n' "$hosts_file" \
        "$([[ $save_dir == outputs ]] || printf ' --save-dir %q' "$save_dir")"
    echo "  stop:    bash launch.sh stop --name $name"
}

host_start() {
    local cores deadline=$((SECONDS + 30)) log=''
    ((EPOCHSECONDS <= start_by)) || { host_say fail "got the start too late and left it"; exit 3; }
    mkdir -p "$run_dir"
    exec 8> "$run_dir/.lock" # tmux inherits it, and so holds the lock while the run lasts
    if ! flock -n 8; then
        host_say fail "$name is already running; give another --name, or: bash launch.sh stop" \
            "--name $name"
        exit 3
    fi
    rm -f "$run_dir"/{exit_code,stopped} "$save_dir/$name/stop-requested"
    echo "$run_id/$host" > "$run_dir/run_id"
    echo "$save_dir" > "$run_dir/save_dir"
    host_torchrun
    host_write_run_script > "$run_dir/run.sh"
    if ((${#hosts[@]} > 1)); then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # = means: this very name
    fi
    # FSDP's buffers vary in size: less memory is lost between them
    [[ $processors == CPU || ${PYTORCH_CUDA_ALLOC_CONF:-} ]] ||
        export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # torchrun would set 1, which leaves cores idle: on the CPU, and in an offloaded AdamW
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    ulimit -n "$(ulimit -Hn)"
    # A socket for this start alone. -f /dev/null: the user's tmux.conf could keep panes, or start
    # other programs in them
    TRAIN_LLM_RUN_ID=$run_id/$host tmux -L "train_llm-$name-${run_id:(-12)}-$number" -f /dev/null \
        new-session -d bash "$run_dir/run.sh"

    # The command to follow the logs is useless before torchrun has made them. A slow start is no
    # failure; status will tell.
    until [[ -e $run_dir/exit_code || $log -nt $run_dir/run.sh ]] || ((SECONDS > deadline)); do
        sleep 0.2
        for log in "$run_dir"/*/attempt_*/*/stderr.log; do
            [[ ! $log -nt $run_dir/run.sh ]] || break
        done
    done
    [[ -e $run_dir/exit_code ]] || return 0
    host_say exit_code "$(< "$run_dir/exit_code")"
    [[ $(< "$run_dir/exit_code") != 0 && ${#hosts[@]} != 1 ]] || return 0
    host_say fail "ended at once with exit code $(< "$run_dir/exit_code"): $(
        grep -E 'Error|error' "$run_dir/agent.log" | tail -n 1 | cut -c 1-200 |
            host_characters); see $run_dir there"
    exit 3
}

# Sets torchrun. Each $ is doubled because torchrun reads ${local_rank} and $$ in arguments as
# macros (torch 2.13, elastic/utils/api.py).
host_torchrun() {
    torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$ranks")
    if ((${#hosts[@]} == 1)); then torchrun+=(--standalone); else
        torchrun+=(
            --nnodes "${#hosts[@]}" --rdzv-backend c10d --rdzv-endpoint "$rendezvous:$port"
            --rdzv-id "$run_id" --rdzv-conf "is_host=$((number == 0))" --local-addr "$address"
        )
    fi
    torchrun+=(--max-restarts "$max_restarts" --log-dir "$run_dir" --redirects 3)
    local sizes
    host_size_demo
    torchrun+=(train_llm.py "${sizes[@]}" "${options[@]//\$/\$\$}")
}

# The script that tmux runs; %q keeps every byte of an argument. When another host makes the ranks
# here start again, torchrun removes the logs of this attempt (torch 2.13, multiprocessing/api.py),
# so a hard link to each is kept while it lives, and gets its name in kept/ when the original went.
host_write_run_script() {
    local keep=''
    ((max_restarts == 0)) || keep="
mkdir -p $run_dir/kept
while sleep 1; do
    find $run_dir -path '*/attempt_*/std*.log' -printf '%p %i\\n' | while read -r log inode; do
        attempt=\${log#*/attempt_}
        attempt=\${attempt%/*}
        ln \"\$log\" \"$run_dir/kept/attempt_\${attempt//\\//-}-\$inode-\${log##*/}.live\" \\
            2> /dev/null
    done
    find $run_dir/kept -links 1 -name '*.live' |
        while read -r lost; do mv \"\$lost\" \"\${lost%.live}\"; done
done &
keeper=\$!"
    cat << EOF
#!/usr/bin/env bash
# Written by launch.sh start and overwritten by the next one.
trap : HUP INT TERM # outlive torchrun, to write down how it ended
trap 'rm -f "\${TMUX%%,*}"' EXIT # its socket, which tmux leaves behind
cd $(printf %q "$PWD") || exit
[[ ! -e $run_dir/given_up || \$(< $run_dir/given_up) != $run_id ]] || exit$keep
{
    echo "==== \$TRAIN_LLM_RUN_ID started \$(printf '%(%FT%T%z)T')"
   $(printf ' %q' "${torchrun[@]}")
    code=\$?
    echo "==== \$TRAIN_LLM_RUN_ID ended \$(printf '%(%FT%T%z)T') with exit code \$code"
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
    local i ok=0 line known=''
    [[ $group ]] || call_hosts "$patience"
    on_hosts host_status "$patience"
    for i in "${asked[@]}"; do [[ ${fact[$i,state]:-none} == none ]] || known=1; done
    [[ $known || ${#complaints[@]} != 0 ]] || no_such_run
    for i in "${asked[@]}"; do
        if [[ ${fact[$i,failed]:-} ]]; then
            ok=1
            echo "$name on ${hosts[i]}: not to be reached"
            continue
        fi
        line=${fact[$i,state]:-none}
        case $line in running | stopping | finished | stopped*", exit code 0") ;; *) ok=1 ;; esac
        [[ $line != none ]] || line="never started here"
        [[ ${fact[$i,attempt]:-0} == 0 ]] || line+=", attempt ${fact[$i,attempt]}"
        [[ ! ${fact[$i,step]:-} ]] || line+=", ${fact[$i,step]}"
        ((${#hosts[@]} == 1)) || [[ ${addresses[i]} == '' || ${first_ranks[i]} != 0 ]] ||
            line+="  (rank 0)"
        echo "$name on ${hosts[i]}: $line"
        host_is_live "${fact[$i,state]}" || [[ ${fact[$i,left]:-0} == 0 ]] ||
            echo "  but ${fact[$i,left]} process(es) of it are left:" \
                "bash launch.sh stop --name $name"
        [[ ${fact[$i,state]} != failed* && ${fact[$i,state]} != ended* ]] ||
            echo "  who failed first: bash launch.sh errors --name $name"
    done
    tell_complaints || true
    return "$ok"
}

errors() {
    local i time rank local_rank code kind log message first='' first_time=0 later
    call_hosts "$patience"
    on_hosts host_errors "$patience"
    while IFS=$'\t' read -r kind time i rank local_rank code log message; do
        if [[ ! $kind ]]; then break; elif [[ ! $first ]]; then
            first=1 first_time=$time
            echo "$name: first to fail: $rank on ${hosts[i]} (local rank or GPU $local_rank)," \
                "$code, at $(date -d "@${time%??????}.${time: -6}" '+%F %T.%6N')"
            echo "  $message"
            if [[ ${fact[$i,tail,$local_rank]:-} ]]; then
                echo "  the last lines of $log on ${hosts[i]}:"
                printf '%s' "${fact[$i,tail,$local_rank]}"
            else echo "  $log on ${hosts[i]} is empty"; fi
            continue
        fi
        later=$(seconds $(((time - first_time) / 1000)))
        [[ $kind == 1own ]] && kind="failed as well" || kind="only ended because of it"
        echo "$kind: $rank on ${hosts[i]}, $code, $later s: $message"
    done < <(for message in "${failures[@]}"; do
        IFS=$'\t' read -r i time kind message <<< "$message"
        printf '%s\t%d\t%d\t%s\n' "$kind" $((time - 1000 * skews[i])) "$i" "$message"
    done | sort -t $'\t' -k1,1 -k2,2n)
    for i in "${asked[@]}"; do
        [[ ! ${fact[$i,state]:-} ]] || echo "${hosts[i]}: ${fact[$i,state]}"
    done
    [[ $first ]] || echo "$name: no rank failed"
    tell_complaints
}

# Sets pids: all processes of the run on this host.
host_find_processes() {
    local id=${run_id:-none}/$host path
    [[ ! -e $run_dir/run_id ]] || read -r id < "$run_dir/run_id"
    pids=()
    while IFS=/ read -r _ _ path _; do pids+=("$path"); done < <(
        grep -lzxF "TRAIN_LLM_RUN_ID=$id" /proc/[0-9]*/environ 2> /dev/null)
}

host_is_live() { [[ $1 == @(running|stopping) ]]; } # STATE

# Sets state: running | stopping | finished | failed ... | stopped ... | ended ... | none; and pids
host_find_state() {
    local code=''
    host_find_processes
    [[ ! -e $run_dir/exit_code ]] || code=$(< "$run_dir/exit_code")
    if [[ ! -e $run_dir/run_id ]]; then state=none
    elif [[ -e $run_dir/stopped && ! $code ]] && ((${#pids[@]})); then state=stopping
    elif [[ -e $run_dir/stopped ]]; then state="stopped by launch.sh stop${code:+, exit code $code}"
    elif [[ $code == 0 ]]; then state=finished
    elif [[ $code ]]; then state="failed with exit code $code"
    elif ((${#pids[@]})); then state=running
    else state="ended without an exit code: killed, or the machine restarted"; fi
}

host_status() {
    local state pids
    [[ ! -e $run_dir/exit_code ]] || sleep 0.5 # the script that wrote it is about to end, too
    host_find_state
    host_say state "$state"
    host_say left "${#pids[@]}"
    [[ $state != none ]] || return 0
    host_say attempt "$(find "$run_dir" -newer "$run_dir/run.sh" -name 'attempt_*' -type d \
        -printf '%f\n' | sed 's/attempt_//' | sort -n | tail -n 1)"
    host_say step "$(host_step)"
}

# The heartbeats of this host's ranks since the start, a line each.
host_beats() {
    local file line told
    while IFS= read -r file; do
        line=$(< "$file") || continue
        if host_told host && [[ $told != "$(uname -n)" ]]; then continue; fi
        printf '%s\n' "${line//$'\n'/ }"
    done < <(find "$(< "$run_dir/save_dir")/$name/heartbeats" -newer "$run_dir/run_id" \
        -name 'rank-*.json' 2> /dev/null)
}

host_told() { # KEY: sets told to what the heartbeat in `line` says of it; fails if nothing
    local pattern="\"$1\": *\"?([^,\"}]*)"
    [[ $line =~ $pattern ]] && told=${BASH_REMATCH[1]}
}

# The last step of this host's slowest rank by its heartbeat, else the last row of the metrics.
host_step() {
    local folder line told oldest='' said=''
    folder=$(< "$run_dir/save_dir")/$name
    while IFS= read -r line; do
        host_told time || continue
        [[ ! $oldest || ${told%.*} -lt $oldest ]] || continue
        oldest=${told%.*} said=step
        ! host_told step || said+=" $told"
        ! host_told steps || said+=" of $told"
        ! host_told phase || said+=" ($told)"
    done < <(host_beats)
    if [[ ! $said && $folder/metrics.jsonl -nt $run_dir/run_id ]]; then
        line=$(tail -n 1 "$folder/metrics.jsonl")
        [[ $line =~ \"step\":\ *([0-9]+) ]] && said="step ${BASH_REMATCH[1]}"
        oldest=$(stat -c %Y "$folder/metrics.jsonl")
    fi
    [[ ! $said ]] || echo "$said, $((EPOCHSECONDS - oldest)) s ago"
}

# A line for each rank of the newest attempt that failed or was ended:
# failure, microseconds, kind, rank, local rank, how, log, message
host_errors() {
    local state pids attempt table='' folder time rank local_rank code kind message seen=' '
    local lost='Connection (reset|closed|refused)|Broken pipe|[Rr]emote (process|error|peer)'
    lost+='|closed by peer|NCCL error|ncclRemoteError|DistBackendError|DistNetworkError'
    lost+='|DistStoreError|Timed out|timed out|Watchdog'
    host_find_state
    [[ $state != none && $state != finished ]] || return 0
    host_say state "$state"
    attempt=$(find "$run_dir" -newer "$run_dir/run.sh" -name 'attempt_*' -type d | sort -V |
        tail -n 1)
    [[ ! -e $run_dir/agent.log ]] || table=$(host_failures)
    while read -r time rank local_rank code; do
        [[ $time ]] || continue
        folder=$attempt/$local_rank seen+="$local_rank "
        message=$(host_exception "$folder/stderr.log") || true
        [[ ! $message ]] || time=$(stat -c %.6Y "$folder/stderr.log")
        kind=1own
        [[ $code != -15 && ! $message =~ $lost ]] || kind=2ended
        : "${message:=no word in its log}"
        [[ $code != -* ]] || message+=" (ended by signal ${code#-})"
        host_failure "$time" "$kind" "rank $rank" "$local_rank" "exit code $code" \
            "$folder/stderr.log" "$message"
    done <<< "$table"
    if [[ ! $table && ( $state == failed* || $state == ended* ) ]]; then
        code=$(cat "$run_dir/exit_code" 2> /dev/null || echo unknown)
        message="torchrun itself ended ($state)"
        if ((code > 128)); then message="torchrun was killed by signal $((code - 128))"
        elif ((code)); then message=$(host_exception "$run_dir/agent.log"); fi 2> /dev/null || true
        kind=1own
        [[ ! $message =~ $lost ]] || kind=2ended
        time=$(stat -c %.6Y "$run_dir/exit_code" 2> /dev/null || stat -c %.6Y "$run_dir/run_id")
        host_failure "$time" "$kind" torchrun - "exit code $code" "$run_dir/agent.log" \
            "${message:-no word in its log}"
    fi
    # Ranks of a run that was stopped before any of them failed were ended, too, but by its user.
    ! host_is_live "$state" && [[ $attempt && ( $state != stopped* || $table ) ]] || return 0
    for folder in "$attempt"/*/; do
        local_rank=$(basename "$folder")
        [[ $local_rank =~ ^[0-9]+$ && $seen != *" $local_rank "* ]] || continue
        host_failure "$(stat -c %.6Y "$folder/stderr.log")" 2ended \
            "rank $((first_rank + local_rank))" "$local_rank" "no exit code of its own" \
            "$folder/stderr.log" "ended by torchrun"
    done
}

host_failure() { # SECONDS.MICROSECONDS KIND RANK LOCAL_RANK HOW LOG MESSAGE
    printf 'failure\t%s' "${1/./}"; printf '\t%s' "${@:2}"; echo
    tail -n 15 "$6" 2> /dev/null | tr '\r' '\n' | tail -n 15 | host_characters |
        sed "s/^/tail\t$4\t| /" || true
}

# Only whole characters: part of one would swallow the end of its line for whoever reads it.
host_characters() { iconv -c -f UTF-8 -t UTF-8 2> /dev/null || cat; }

# What ended a process, by the last line that says so in its log.
host_exception() {
    local says='[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b|[A-Za-z_.]+: error:'
    grep -aE "^(\[rank[0-9]+\]: *)?($says)" "$1" |
        tail -n 1 | tr '\t' ' ' | cut -c 1-300 | host_characters
}

# torchrun's tables of this start: seconds, rank, local rank, exit code
host_failures() {
    sed "0,\|^==== $(< "$run_dir/run_id") started|d" "$run_dir/agent.log" | awk '
        / time +: / {gsub(/[-_:]/, " ", $3); time = mktime($3)}
        / rank +: / {rank = $3; gsub(/[^0-9]/, "", $5); local_rank = $5}
        / exitcode +: / {print time ".000000", rank, local_rank, $3}'
}

# --- 6. Logs ----------------------------------------------------------------------------
# Following wants files that are here. Each host sends what its logs grew by, with the place in the
# file, every second over one connection; what comes is written to that very place, so that nothing
# happens where the disk is shared and the file is the same one. The loop on the host ends with the
# run, or when nobody takes what it says: a remote loop would else outlive its client.

logs() {
    exec {screen}>&1
    call_hosts 0
    on_hosts host_follow 1000000000
    tell_complaints
}

# How much of each log is here, for the host; a little of it is asked for again, to be shown.
find_offsets() {
    local size path
    local -A offsets=()
    while IFS=$'\t' read -r size path; do
        offsets[$path]=$((size > 2000 ? size - 2000 : 0))
    done < <(find "$run_dir" -type f -name '*.log' -printf '%s\t%P\n' 2> /dev/null)
    echo -n "; $(declare -p offsets)"
}

receive_log() { # I OFFSET-tab-PATH-tab-BASE64
    local from path data file
    IFS=$'\t' read -r from path data <<< "$2"
    [[ $path && $path != /* && $path != *..* ]] || return 0
    file=logs/$name/${hosts[$1]}/$path
    mkdir -p "$(dirname "$file")"
    base64 -d <<< "$data" | dd of="$file" oflag=seek_bytes seek="$from" conv=notrunc status=none
    [[ $path == *stderr.log || $path == agent.log ]] || return 0
    [[ ${shown:-} == "$path" ]] || printf '\n==> %s <==\n' "$file" >&"$screen"
    shown=$path
    base64 -d <<< "$data" >&"$screen"
}

host_follow() {
    local ended='' more size path from pids state
    while :; do
        host_find_state
        [[ $state != none ]] || { host_say fail "no run $name was started here"; exit 3; }
        host_is_live "$state" || ended=1
        more=''
        while IFS=$'\t' read -r size path; do
            from=${offsets[$path]:-0}
            ((size > from)) || continue
            ((size - from <= 65536)) || { size=$((from + 65536)) more=1; }
            printf 'log\t%s\t%s\t%s\n' "$from" "$path" "$(tail -c "+$((from + 1))" \
                "$run_dir/$path" | head -c $((size - from)) | base64 -w 0)"
            offsets[$path]=$size
        done < <(find "$run_dir" -type f \( -name '*.log' -o -name exit_code \) -printf '%s\t%P\n')
        echo || exit 0 # ends the loop when nobody listens
        [[ ! $more ]] || continue
        [[ ! $ended ]] || break
        sleep 1
    done
}

# --- 7. Stop ----------------------------------------------------------------------------
# The trainer saves and leaves at the next step if it finds the file stop-requested. That needs
# every rank, so where a host has failed or cannot be reached nobody is asked. After that, and a
# grace, what still carries the run's id gets SIGTERM, and after another SIGKILL.

stop() {
    local i failed=0 reached=() known='' running=''
    asked_to_end=1 speaker=''
    call_hosts $((grace + kill_grace + 4 * patience + 86400)) # a save may take hours
    if [[ $now && $run_id ]]; then known=1; else # else nobody needs to know how far it is
        on_hosts host_status "$patience"
    fi
    for i in "${asked[@]}"; do
        [[ ${fact[$i,state]:-none} == none ]] || known=1
        host_is_live "${fact[$i,state]:-}" && running=1 || asked_to_end=''
        if [[ ${fact[$i,failed]:-} ]]; then failed=1; else reached+=("$i"); fi
    done
    [[ $known || $failed == 1 ]] || no_such_run
    [[ ! $now ]] || asked_to_end=''
    [[ $asked_to_end || $now || ! $running ]] ||
        echo "$name: not every host of it runs, so it cannot save and is not asked to"
    asked=("${reached[@]}")
    ((!${#reached[@]})) || speaker=${hosts[reached[0]]}
    on_hosts host_stop $((grace + kill_grace + 2 * patience))
    tell_complaints "NOT stopped: "
}

host_stop() {
    local -A sent=()
    local pids pid command words request signal=TERM deadline
    if [[ $only ]]; then # a start was given up: one that is still on its way must not begin
        mkdir -p "$run_dir"
        echo "$run_id" > "$run_dir/given_up"
        grep -qsxF "$run_id/$host" "$run_dir/run_id" || return 0
    fi
    host_find_processes
    ((${#pids[@]})) || { host_say say "$name on $host: not running"; return; }
    read -r request < "$run_dir/save_dir"
    request+=/$name/stop-requested
    # a run that has an exit code ended before this, and only leftovers are removed
    if [[ ! -e $run_dir/exit_code ]]; then
        touch "$run_dir/stopped"
        [[ ! $asked_to_end ]] || host_ask_to_end
    fi
    deadline=$((SECONDS + kill_grace))
    while ((${#pids[@]})); do
        for pid in "${pids[@]}"; do
            [[ ${sent[$pid]:-} != "$signal" ]] || continue
            mapfile -d '' -t words 2> /dev/null < "/proc/$pid/cmdline" || continue
            command="${words[*]//$'\n'/ }"
            [[ $command ]] || continue # it has just ended
            # tmux ends by itself after its last process; ended sooner, it would hang up on torchrun
            [[ $signal$command != TERMtmux* || ${#pids[@]} == 1 ]] || continue
            host_say say "$name on $host: SIG$signal to $pid ${command:0:90}"
            kill -s "$signal" "$pid" 2> /dev/null || true
            sent[$pid]=$signal
        done
        for pid in "${pids[@]}"; do # looking through /proc again costs more than looking at these
            while [[ ${sent[$pid]:-} ]] && host_is_alive "$pid" && ((SECONDS < deadline)); do
                sleep 0.1
            done
        done
        ((SECONDS < deadline)) || signal=KILL
        ((SECONDS < deadline + 30)) ||
            { host_say fail "SIGKILL did not end ${pids[*]}"; exit 3; }
        host_find_processes
    done
    rm -f "$request"
    host_say say "$name on $host: no process of it is left"
}

# A process that ended has no command line, even while nobody has asked for its exit code.
host_is_alive() { { IFS= read -r -d '' _ < "/proc/$1/cmdline"; } 2> /dev/null; }

# Whether a rank here says that it saves, and lives.
host_saves() {
    local line told
    while IFS= read -r line; do
        if host_told phase && [[ $told == @(saving|exporting) ]] &&
            host_told pid && [[ " ${pids[*]} " == *" $told "* ]]; then return 0; fi
    done < <(host_beats)
    return 1
}

host_ask_to_end() {
    local deadline=$((SECONDS + grace)) told=$SECONDS a_day=$((SECONDS + 86400))
    mkdir -p "$(dirname "$request")"
    touch "$request"
    [[ $host != "$speaker" ]] || host_say say "$name: asked to save and end at its next step;" \
        "waiting up to $grace s (stop --now does not ask)"
    while [[ ! -e $run_dir/exit_code ]] && ((${#pids[@]} && SECONDS < deadline)); do
        sleep 0.5
        if host_saves && ((SECONDS < a_day)); then
            deadline=$((SECONDS + grace)) # it ends when that has ended
            host_say saves 1
        fi
        if [[ $host == "$speaker" ]] && ((SECONDS >= told + 10)); then
            told=$SECONDS
            host_say say "$name: $(host_step), waiting up to $((deadline - SECONDS)) s more"
        fi
        host_find_processes
    done
    [[ ! -e $run_dir/exit_code ]] || sleep 0.5 # run.sh is about to end
    [[ -e $run_dir/exit_code ]] || host_say say "$name on $host: did not end within $grace s"
    host_find_processes
}

[[ ${EPOCHREALTIME:-} ]] || abort "this is bash $BASH_VERSION; bash 5 or newer is needed"
# A shell inside the tmux of a run carries its id: drop it, or stop would end itself.
[[ ! -v TRAIN_LLM_RUN_ID ]] || exec env -u TRAIN_LLM_RUN_ID bash "$0" "$@"
called_from=$PWD
[[ ${PYTHON:=} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")"
main "$@"
