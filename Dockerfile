# Two stages: the first builds the environment, the second holds what runs, as a user without rights.
FROM python:3.11.11-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make=4.3-4.1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /edgestill
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY compress compress
COPY deploy deploy
COPY evaluators evaluators
COPY profiles profiles
RUN make setup

FROM python:3.11.11-slim-bookworm
RUN useradd --create-home --uid 10001 edgestill
COPY --from=build --chown=edgestill:edgestill /edgestill /edgestill
USER 10001
WORKDIR /home/edgestill
ENV PATH=/edgestill/.venv/bin:$PATH
ENTRYPOINT ["edgestill"]
CMD ["--help"]
