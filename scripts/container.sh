#!/usr/bin/env bash
# Builds the image and tries it, without a container engine: see --help.
set -euo pipefail

usage() {
    cat <<'END'
scripts/container.sh [options]

Builds the Dockerfile with buildah on a base made by debootstrap, runs the image's root file system in a cell (read-only,
no capabilities, no new privileges, an engine's system call filter, no network but loopback; scripts/container_cell.py),
checks it (scripts/container_trial.py) and prints one JSON result. Needs root on Debian or Ubuntu with the packages
buildah, debootstrap, util-linux and iproute2, about 5 GB of disk and some minutes.

  --variant cpu|cuda   what to build (default cpu; cuda is built and inspected, not run)
  --context DIR        where the sources are (default: this repository)
  --work DIR           where everything is made (default: a new directory in /var/tmp, removed at the end)
  --mirror URL         Debian mirror (default: this machine's apt)
  --keep               keep the work directory: the next build starts from its layers
  --reuse              try the image that lies in --work as it is; nothing is built, and it stays there
  --cold               take the image's files out of the page cache first: a start that reads them from the disk
  --json FILE          write the result there too
  --help

pip's configuration of this machine (pip config list) reaches the build as a secret, local package folders as read-only
mounts; neither is found in the image, which is checked.
END
}

fail() {
    echo "container.sh: $*" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
variant=cpu context=$(dirname "$here") work="" mirror="" keep="" json="" reuse="" cold=""
while [ $# -gt 0 ]; do
    case "$1" in
        --variant | --context | --work | --mirror | --json)
            [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --keep) keep=yes ;;
        --reuse) reuse=yes keep=yes ;;
        --cold) cold=yes ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
case "$variant" in cpu | cuda) ;; *) fail "--variant is cpu or cuda, not $variant" ;; esac
[ -z "$reuse" ] || [ -d "$work" ] || fail "--reuse needs --work with the directory of a build that was kept (--keep)"
for tool in buildah debootstrap unshare nsenter setpriv ip python3; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install buildah debootstrap util-linux iproute2 python3"
done
[ "$(id -u)" = 0 ] || fail "needs root: it mounts file systems and makes namespaces"

if [ -z "$work" ]; then work=$(mktemp -d /var/tmp/serverlesslora-container.XXXXXX); else mkdir -p "$work"; fi
work=$(cd "$work" && pwd)
image="localhost/serverlesslora:$variant"

say() { echo "== $*" >&2; }

# Layers are kept where the kernel stacks them; vfs would copy each in full, so there stages are committed whole.
stacks() {
    local at="$work/overlay" works=0
    mkdir -p "$at"/{lower,upper,work,merged}
    mount -t overlay overlay -o "lowerdir=$at/lower,upperdir=$at/upper,workdir=$at/work" "$at/merged" 2>/dev/null \
        && umount "$at/merged" || works=1
    rm -rf "$at"
    return "$works"
}
driver=vfs layers=()
if stacks; then driver=overlay layers=(--layers); fi
tool=(nice -n 10 buildah --root "$work/store" --runroot "$work/run" --storage-driver "$driver")
container=""

cleanup() {
    [ -z "$container" ] || "${tool[@]}" rm "$container" >/dev/null || true
    [ -z "$keep" ] || return 0
    "${tool[@]}" rm --all >/dev/null || true
    ! mountpoint -q "$work/store/overlay" || umount "$work/store/overlay"
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

# --- the base: Debian with Python and certificates ---
exists() { "${tool[@]}" inspect --type image "$1" >/dev/null 2>&1; }
if [ -n "$reuse" ]; then
    exists "$image" || fail "there is no image $image in $work; build it with --keep --work $work"
elif ! exists localhost/debian-base; then
    say "base by debootstrap"
    if [ -z "$mirror" ]; then
        mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' \
            | awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')
        [ -n "$mirror" ] || fail "apt knows no mirror of bookworm; give one with --mirror URL"
    fi
    mkdir -p "$work/base"
    nice -n 10 debootstrap --variant=minbase --include=python3.11,ca-certificates bookworm "$work/base/root" "$mirror" \
        >"$work/debootstrap.log" 2>&1 || fail "debootstrap failed: $(tail -3 "$work/debootstrap.log")"
    rm -rf "$work"/base/root/{var/cache/apt,var/lib/apt/lists,usr/share/doc,usr/share/man,usr/share/locale}/*
    rm -rf "$work"/base/root/var/log/* "$work"/base/root/etc/resolv.conf "$work"/base/root/etc/hostname
    tar -C "$work/base/root" -c -f "$work/base/root.tar" . && rm -rf "$work/base/root"
    printf 'FROM scratch\nADD root.tar /\n' >"$work/base/Dockerfile"
    "${tool[@]}" bud --isolation chroot --format docker --tag localhost/debian-base "$work/base" >/dev/null 2>&1 \
        || fail "importing the base failed"
    rm -rf "$work/base"
fi

# --- how this machine's pip finds packages, for the build only; an address may name an account ---
install -m 600 /dev/null "$work/pip.conf"
python3 -m pip config list | python3 -c '
import ast, sys
found = {}
for line in sys.stdin:
    place, _, value = line.strip().partition("=")
    source, _, name = place.rpartition(".")
    if name not in ("cert", "no-index", "require-virtualenv", "user", "cache-dir"):
        if source == ":env:" or name not in found:  # the environment wins
            found[name] = ast.literal_eval(value)
print("[global]", *(f"{name} = {value}" for name, value in found.items()), sep="\n")
' >"$work/pip.conf"
secrets=(--secret "id=pip.conf,src=$work/pip.conf")
certificates=$(python3 -m pip config list | sed -n "s/^[^=]*\.cert='\(.*\)'/\1/p" | head -1)
[ -z "$certificates" ] || secrets+=(--secret "id=ca.crt,src=$certificates")
mounts=() folders=()
while read -r folder; do
    while [ "$(basename "$folder")" = simple ]; do folder=$(dirname "$folder"); done
    [ ! -d "$folder" ] || { mounts+=(--volume "$folder:$folder:ro") && folders+=("$folder"); }
done < <(sed 's/^[^=]*= //' "$work/pip.conf" | tr ' ' '\n' | sed -n 's,^\(file://\)\?\(/..*\),\2,p' | sort -u)

# --- the image ---
build_s=null
if [ -z "$reuse" ]; then
    say "image ($variant)"
    began=$SECONDS
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$context/serverlesslora/__init__.py")
    "${tool[@]}" bud --isolation chroot --format docker --pull-never "${layers[@]}" --force-rm --tag "$image" \
        --build-arg BASE=localhost/debian-base --build-arg "VARIANT=$variant" --build-arg "VERSION=$version" \
        "${secrets[@]}" "${mounts[@]}" "$context" >"$work/build.log" 2>&1 \
        || fail "the build failed: $(grep -v '^WARNING' "$work/build.log" | tail -15)"
    build_s=$((SECONDS - began))
fi

container=$("${tool[@]}" from --pull-never "$image")
root=$("${tool[@]}" mount "$container")
"${tool[@]}" inspect --type image "$image" >"$work/image.json"

# --- nothing of this machine in it ---
traces=$(
    for folder in "${folders[@]}"; do [ ! -e "$root$folder" ] || echo "$folder"; done
    for file in /etc/pip.conf /run/ca.crt /build /source /wheel; do [ ! -e "$root$file" ] || echo "$file"; done
    # Addresses that pip was told, in the image's history or anywhere in what was installed.
    sed 's/^[^=]*= //' "$work/pip.conf" | tr ' ' '\n' | sed -n 's,^https\?://\(.*@\)\?\([^/:]*\).*,\2,p' | sort -u \
        | while read -r host; do grep -rlF -- "$host" "$work/image.json" "$root/etc" || true; done
    grep -oE '(--index-url|extra-index-url|find-links|://[^/" ]*@)[^" ]*' "$work/image.json" || true
)
[ -z "$traces" ] || fail "the image holds traces of the machine it was built on: $traces"

size() { du --apparent-size -sm "$@" 2>/dev/null | awk '{ all += $1 } END { print all + 0 }'; }
site="$root/opt/serverlesslora/lib/python3.11/site-packages"
total=$(size "$root") libraries=$(size "$site") own=$(size "$site"/serverlesslora*)
sizes=$(printf '{"all": %d, "base": %d, "libraries": %d, "of_those_torch": %d, "server_and_kernels": %d}' "$total" \
    $((total - libraries)) $((libraries - own)) "$(size "$site/torch")" "$own")
say "MiB: $sizes"
if [ "$variant" = cuda ]; then
    echo "{\"variant\": \"cuda\", \"build_s\": $build_s, \"size_mib\": $sizes}" | tee ${json:+"$json"}
    exit 0
fi

# --- run it ---
say "trial"
seccomp=/usr/share/containers/seccomp.json
python3 -c 'import json, sys; json.dump(json.load(open(sys.argv[1]))["Docker"]["config"], open(sys.argv[2], "w"))' \
    "$work/image.json" "$work/config.json"
status=0
unshare --mount --propagation private python3 "$here/container_trial.py" --root "$root" \
    --image-config "$work/config.json" --log "$work/server.log" \
    ${cold:+--cold} $([ ! -e "$seccomp" ] || echo --seccomp "$seccomp") >"$work/trial.json" || status=$?
[ "$status" = 0 ] || tail -20 "$work/server.log" >&2
python3 -c '
import json, sys
result = json.load(open(sys.argv[1]))
result["setup"] |= {"variant": sys.argv[2], "build_s": json.loads(sys.argv[3]), "size_mib": json.loads(sys.argv[4])}
print(json.dumps(result))
' "$work/trial.json" "$variant" "$build_s" "$sizes" | tee ${json:+"$json"}
say "$(python3 -c 'import json, sys; r = json.load(open(sys.argv[1])); print(r["passed"], "passed,", r["failed"], "failed")' \
    "$work/trial.json")"
exit "$status"
