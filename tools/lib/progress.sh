# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Says what is being done, how long that takes, and where it went wrong.

LOGS=$CACHE/logs
TOTAL_LEFT=0 # seconds that the steps still to come are expected to take
STEP_JOB=

mmss() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# The part of a log line that fits, without what a terminal would act on.
last_line() {
	tail -c 2000 "$1" 2>/dev/null | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1 |
		tr -cd '[:print:]' | cut -c "1-${2:-70}" || :
}

stop_step() {
	[[ -z $STEP_JOB ]] || kill -TERM -- "-$STEP_JOB" 2>/dev/null || :
}
trap stop_step EXIT
trap 'stop_step; echo; echo "interrupted; run it again to go on from here" >&2; exit 130' INT TERM HUP

# run_step NAME SECONDS DOWNLOAD_MB DESCRIPTION COMMAND...
run_step() {
	local name=$1 expected=$2 megabytes=$3 description=$4
	shift 4
	local log=$LOGS/$name.log start=$SECONDS elapsed left download='' told=0
	mkdir -p "$LOGS"
	((megabytes == 0)) || download="downloads about $megabytes MB, "
	printf '==> %s (%sabout %s; everything still to do: about %s)\n' "$description" "$download" \
		"$(mmss "$expected")" "$(mmss "$TOTAL_LEFT")"

	# A process group of its own, so that an interrupt reaches all of it.
	set -m
	(
		set -euo pipefail
		trap - EXIT INT TERM HUP
		"$@"
	) >"$log" 2>&1 </dev/null &
	STEP_JOB=$!
	set +m

	while kill -0 "$STEP_JOB" 2>/dev/null; do
		sleep 0.5
		elapsed=$((SECONDS - start))
		if [[ -t 1 ]]; then
			printf '\r\033[K    %s / %s  %s' "$(mmss "$elapsed")" "$(mmss "$expected")" \
				"$(last_line "$log" 60)"
		elif ((elapsed > 0 && elapsed % 10 == 0 && elapsed != told)); then
			told=$elapsed
			left=$((TOTAL_LEFT - elapsed))
			printf '    %s of about %s, all in all %s left: %s\n' "$(mmss "$elapsed")" \
				"$(mmss "$expected")" "$(mmss $((left > 0 ? left : 0)))" "$(last_line "$log")"
		fi
	done
	[[ ! -t 1 ]] || printf '\r\033[K'

	local status=0
	wait "$STEP_JOB" || status=$?
	STEP_JOB=
	if ((status)); then
		{
			printf '\nsetup: failed: %s (exit status %d). The end of its log:\n\n' "$description" "$status"
			tail -n 20 "$log" | sed 's/^/    /'
			printf '\nThe whole log is %s\n' "$log"
			printf 'When the cause is gone (network? disk space?), run tools/setup again: it goes on with this step.\n'
		} >&2
		exit 1
	fi
	TOTAL_LEFT=$((TOTAL_LEFT > expected ? TOTAL_LEFT - expected : 0))
	printf '    done in %s\n' "$(mmss $((SECONDS - start)))"
}
