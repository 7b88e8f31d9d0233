# Two stages: the first installs the package, the second holds what runs, as a user without rights.
FROM python:3.11.11-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make=4.3-4.1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY compress compress
COPY deploy deploy
COPY evaluators evaluators
COPY profiles profiles
# What `make wheel-test` runs in CI: pinned versions, no dev tools, and no link to /src, which stays behind.
RUN make install VENV=/opt/edgestill

FROM python:3.11.11-slim-bookworm
RUN useradd --create-home --uid 10001 edgestill
COPY --from=build /opt/edgestill /opt/edgestill
USER 10001
WORKDIR /home/edgestill
ENV PATH=/opt/edgestill/bin:$PATH
ENTRYPOINT ["edgestill"]
CMD ["--help"]
