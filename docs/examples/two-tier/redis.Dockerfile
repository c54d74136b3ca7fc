# The database tier. The password reaches redis through its standard input: a command line is public.
ARG BASE=debian:trixie-slim
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/*
EXPOSE 6379
CMD ["/bin/sh", "-c", "printf 'requirepass %s\\n' \"$(cat /run/secrets/password)\" | exec redis-server - --save ''"]
