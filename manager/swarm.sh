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
        case "${!image}" in "$LB_REGISTRY"/*) continue ;; esac
        step "Publishing ${!image} at $LB_REGISTRY" publish "${!image}"
        printf -v "$image" %s "$LB_REGISTRY/${!image}"
    done
}

publish() { docker tag "$1" "$LB_REGISTRY/$1" && docker push "$LB_REGISTRY/$1"; }

# share_secrets: the token, and the certificate and key by which balancers know the manager, are the same on every node
# that runs the manager, now or later; Swarm hands them to the balancers alone.
share_secrets() {
    local balancer secret
    balancer=$(ours balancer | head -n 1)
    if [ -n "$balancer" ] && ! { [ -s "$RUN/token" ] && [ -s "$RUN/manager.pem" ]; }; then
        (umask 077 && for secret in token manager.pem; do docker exec "$balancer" cat "/run/secrets/$secret" >"$RUN/$secret"; done)
    fi
    if ! [ -s "$RUN/token" ] && docker secret inspect "$LB_PROJECT-token" >/dev/null 2>&1; then
        die "project $LB_PROJECT runs in this Swarm, and no balancer on this node knows its secrets; run this on a node that has one, or bring $RUN/token and $RUN/manager.pem from where the manager was"
    fi
    make_token
    if ! [ -s "$RUN/manager.pem" ]; then
        have openssl || need "the manager's certificate" openssl
        (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
            -subj /CN=lbscaler-manager -addext subjectAltName=DNS:lbscaler-manager \
            -keyout "$RUN/key.pem" -out "$RUN/manager.pem" 2>>"$LOG" &&
            cat "$RUN/key.pem" >>"$RUN/manager.pem" && rm "$RUN/key.pem")
    fi
    for secret in token manager.pem; do
        if docker secret inspect "$LB_PROJECT-$secret" >/dev/null 2>&1; then
            [ "$(secret_digest "$secret")" = "$(docker secret inspect --format '{{index .Spec.Labels "lbscaler.digest"}}' "$LB_PROJECT-$secret")" ] ||
                die "$RUN/$secret is not the one this Swarm's balancers have; bring it from the node that ran the manager, or ./stop.sh first"
        else
            docker secret create --label "lbscaler.project=$LB_PROJECT" --label "lbscaler.digest=$(secret_digest "$secret")" \
                "$LB_PROJECT-$secret" "$RUN/$secret" >>"$LOG"
        fi
    done
}

secret_digest() { sha256sum <"$RUN/$1" | cut -c1-16; }

# Every address the manager may be at: balancers try one after the other.
manager_addresses() {
    local node addresses
    addresses=$MANAGER_ADDRESS:$LB_MANAGER_PORT
    for node in $(docker node ls -q --filter role=manager | xargs docker node inspect --format '{{.Status.Addr}}'); do
        [ "$node" = "$MANAGER_ADDRESS" ] || [ "$node" = 0.0.0.0 ] || addresses+=,$node:$LB_MANAGER_PORT
    done
    echo "$addresses"
}

# One balancer a node, its port published on that node alone: no hop through another node for who comes to this one.
launch_balancers() {
    local where options=()
    eval "where=($LB_BALANCER_CONSTRAINT)" # words quoted as in a shell, checked by settings.py
    options=("${where[@]/#/--constraint=}")
    [ -n "$LB_REGISTRY" ] || options+=(--no-resolve-image)
    docker service rm "$LB_PROJECT-balancer" 2>/dev/null || true
    docker service create --detach --name "$LB_PROJECT-balancer" --mode global --network "$LB_PROJECT" \
        --publish "mode=host,published=$LB_PORT,target=8000" \
        --label "lbscaler.project=$LB_PROJECT" --label lbscaler.role=balancer --label "lbscaler.config=$1" \
        --container-label "lbscaler.project=$LB_PROJECT" --container-label lbscaler.role=balancer \
        "${options[@]}" "${BALANCER_RIGHTS[@]}" --mount type=tmpfs,target=/run \
        --limit-memory 512m --limit-pids 256 --update-order stop-first --endpoint-mode dnsrr \
        --stop-grace-period "$((${LB_DRAIN_TIMEOUT%.*} + 5))s" \
        --secret "source=$LB_PROJECT-token,target=token" --secret "source=$LB_PROJECT-manager.pem,target=manager.pem" \
        --env "LB_MANAGERS=$(manager_addresses)" --env "LB_NODE={{.Node.ID}}" --env "LB_BACKEND_PORT=$LB_BACKEND_PORT" \
        --env "LB_LEAVE=${LB_DRAIN_TIMEOUT%.*}" "$(pinned_balancer)"
}

# By id where nothing is to be pulled, or the engine would ask a registry for it first.
pinned_balancer() {
    if [ -n "$LB_REGISTRY" ]; then echo "$BALANCER_IMAGE"; else docker image inspect --format '{{.Id}}' "$BALANCER_IMAGE"; fi
}

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
    for role in balancer backend; do
        for service in $(our_services "$role"); do
            [ "$role" = backend ] || [ "$DRAIN" -eq 0 ] || step "Letting connections in hand finish on every node" send_away "$service"
            step "Removing the service $LB_PROJECT-$role" docker service rm "$service"
        done
    done
    for service in $(docker node ls -q); do
        docker node update --label-rm "lbscaler.manager.$LB_PROJECT" "$service" >>"$LOG" 2>&1 || true
    done
    docker secret ls -q --filter "label=lbscaler.project=$LB_PROJECT" 2>/dev/null | xargs -r docker secret rm >>"$LOG"
}

# A balancer that is told to end deals nobody any more and waits for its flows to end; Swarm ends it when it has waited
# longer than its grace.
send_away() {
    local tries
    docker service update --detach --constraint-add node.role==nowhere "$1"
    for ((tries = 0; tries < 600; tries++)); do
        docker service ps --format '{{.CurrentState}}' "$1" | grep -q '^Running' || return 0
        sleep 0.2
    done
}
