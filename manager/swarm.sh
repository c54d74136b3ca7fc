# shellcheck shell=bash
# What run.sh and stop.sh do differently where a Swarm runs the backends. Sourced after host.sh.

SWARM_NODE='{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}} {{.Swarm.NodeAddr}}'

# join_swarm: this node has to be one that may give a Swarm its orders; MANAGER_ADDRESS is where others reach it.
join_swarm() {
    local state control
    read -r state control MANAGER_ADDRESS < <(docker info --format "$SWARM_NODE")
    if [ "$state" = inactive ]; then
        [ -n "$SWARM_INIT" ] || die "this host is in no Swarm; join one as a manager, or make one with --swarm-init"
        step "Making a Swarm of this host" docker swarm init ${LB_ADVERTISE:+--advertise-addr "$LB_ADVERTISE"}
        UNDO=(leave_swarm "${UNDO[@]}")
        read -r state control MANAGER_ADDRESS < <(docker info --format "$SWARM_NODE")
    fi
    [ "$state" = active ] || die "this host's place in its Swarm is '$state', it has to be active; see docker info"
    [ "$control" = true ] || die "this node is a worker of its Swarm; run on a manager of it, or: docker node promote"
    MANAGER_ADDRESS=${LB_ADVERTISE:-$MANAGER_ADDRESS}
    [ -n "$LB_REGISTRY" ] || [ "$(docker node ls -q | wc -l)" -eq 1 ] ||
        die "the Swarm has $(docker node ls -q | wc -l) nodes, which need a place to get the images from: --registry HOST:PORT"
}

leave_swarm() { docker swarm leave --force; }

# publish_images: to where the nodes get them from, and by that name from now on.
publish_images() {
    [ -n "$LB_REGISTRY" ] || return 0
    local image
    for image in BALANCER_IMAGE BACKEND_IMAGE; do
        case "${!image}" in "$LB_REGISTRY"/* | sha256:*) continue ;; esac # it is there already
        step "Publishing ${!image} at $LB_REGISTRY" publish "${!image}"
        printf -v "$image" %s "$LB_REGISTRY/${!image}"
    done
}

publish() { docker tag "$1" "$LB_REGISTRY/$1" && docker push "$LB_REGISTRY/$1"; }

# share_secrets: the token and the certificate go to the balancers, by the names in LB_TOKEN_SECRET and
# LB_CERTIFICATE_SECRET. The certificate with its key is a secret of its own that no balancer gets: a manager that takes
# over on another node goes on with it, so that no balancer has to be updated while a node is lost.
share_secrets() {
    export LB_TOKEN_SECRET=$LB_PROJECT-token LB_CERTIFICATE_SECRET=$LB_PROJECT-certificate
    local key=$LB_PROJECT-manager
    if ! { [ -s "$RUN/token" ] && [ -s "$RUN/manager.pem" ]; } && docker secret inspect "$key" >/dev/null 2>&1; then
        step "Fetching the project's secrets from the Swarm" fetch_secrets "$LB_TOKEN_SECRET" "$key"
    fi
    make_token
    make_certificate
    share_secret "$LB_TOKEN_SECRET" token
    share_secret "$LB_CERTIFICATE_SECRET" certificate.pem
    share_secret "$key" manager.pem
}

# fetch_secrets TOKEN KEY: Swarm hands secrets to tasks alone, so a task on this node has them for a moment.
fetch_secrets() {
    local service=$LB_PROJECT-secrets status=0
    docker service rm "$service" 2>/dev/null || true # of a start that was killed
    docker service create --detach --name "$service" --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=secrets \
        --no-resolve-image --constraint "node.id==$(docker info --format '{{.Swarm.NodeID}}')" --restart-condition none \
        --secret "source=$1,target=token" --secret "source=$2,target=manager.pem" --entrypoint "sleep 120" "$BALANCER_IMAGE"
    read_secrets "$service" || status=$?
    docker service rm "$service"
    return "$status"
}

read_secrets() {
    local tries container file
    for ((tries = 0; tries < 600; tries++)); do
        container=$(docker ps -q --filter "label=com.docker.swarm.service.name=$1")
        [ -z "$container" ] || break
        sleep 0.1
    done
    for file in token manager.pem; do
        [ ! -s "$RUN/$file" ] || continue
        (umask 077 && docker exec "$container" cat "/run/secrets/$file" >"$RUN/$file.new") && mv "$RUN/$file.new" "$RUN/$file" || return 1
    done
}

make_certificate() {
    have openssl || need "the manager's certificate" openssl
    if ! [ -s "$RUN/manager.pem" ]; then
        (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
            -subj /CN=lbscaler-manager -addext subjectAltName=DNS:lbscaler-manager \
            -keyout "$RUN/key.pem" -out "$RUN/manager.pem.new" 2>>"$LOG" &&
            cat "$RUN/key.pem" >>"$RUN/manager.pem.new" && rm "$RUN/key.pem")
        mv "$RUN/manager.pem.new" "$RUN/manager.pem"
    fi
    openssl x509 -in "$RUN/manager.pem" -out "$RUN/certificate.pem" # without the key
}

# share_secret NAME FILE
share_secret() {
    local stored
    if stored=$(docker secret inspect --format '{{index .Spec.Labels "lbscaler.digest"}}' "$1" 2>/dev/null); then
        [ "$stored" = "$(secret_digest "$2")" ] ||
            die "$RUN/$2 is not the one this Swarm's balancers have; bring it from the node that ran the manager, or ./stop.sh first"
        return
    fi
    docker secret create --label "lbscaler.project=$LB_PROJECT" --label "lbscaler.digest=$(secret_digest "$2")" \
        "$1" "$RUN/$2" >>"$LOG"
}

secret_digest() { sha256sum <"$RUN/$1" | cut -c1-16; }

# -- stop.sh ------------------------------------------------------------------------------------------------------------

# Whether the project's tasks here are a Swarm's that this node may not give orders to.
is_worker() {
    [ "$(docker info --format '{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}')" = "active false" ] &&
        [ -n "$(docker ps -aq --filter "label=lbscaler.project=$LB_PROJECT" --filter label=com.docker.swarm.service.name)" ]
}

our_services() { docker service ls -q --filter "label=lbscaler.project=$LB_PROJECT" --filter "label=lbscaler.role=$1" 2>/dev/null; }

# A manager on another node is told first, as another manager would tell it: it would make the services again.
remove_services() {
    local role service self
    self=$(docker info --format '{{.Swarm.NodeID}}')
    docker node update --label-add "lbscaler.manager.$LB_PROJECT=$(($(date +%s) + 86400)) stop.sh" "$self" >>"$LOG"
    sleep 5
    for role in secrets balancer backend; do
        for service in $(our_services "$role"); do
            [ "$role" != balancer ] || [ "$DRAIN" -eq 0 ] || step "Letting connections in hand finish on every node" send_away "$service"
            step "Removing the service $LB_PROJECT-$role" docker service rm "$service"
        done
    done
}

# gives_orders: whether this node is a manager of a Swarm.
gives_orders() { [ "$(docker info --format '{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}')" = "active true" ]; }

# forget_in_swarm: a start that failed may have left these without any service.
forget_in_swarm() {
    local node
    for node in $(docker node ls -q); do
        docker node update --label-rm "lbscaler.manager.$LB_PROJECT" "$node" >>"$LOG" 2>&1 || true
    done
    docker secret ls -q --filter "label=lbscaler.project=$LB_PROJECT" | xargs -r docker secret rm >>"$LOG"
}

# A balancer that is told to end deals nobody any more and waits for its flows to end; Swarm ends it when it has waited
# longer than its grace.
send_away() {
    local tries
    # With another digest, so that a manager that comes back after all updates it again.
    docker service update --detach --label-add lbscaler.config=leaving --constraint-add node.role==nowhere "$1"
    for ((tries = 0; tries < 600; tries++)); do
        docker service ps --format '{{.CurrentState}}' "$1" | grep -q '^Running' || return 0
        sleep 0.2
    done
}
