-- Schema 1 of the control plane on PostgreSQL.
-- Times are microseconds since the epoch, UTC, from the database's clock. JSON is text, not jsonb:
-- it may contain \u0000, which jsonb refuses, and it must return as it came. Ids sort by bytes.
-- The columns of items, sessions and environments are the fields of Item (stored_item.py),
-- StoredSession (stored_session.py) and Environment (environments.py).
-- No foreign keys: they would lock the session's row for each change of its items.

CREATE FUNCTION workpool_now() RETURNS bigint
    LANGUAGE sql VOLATILE PARALLEL SAFE
    AS $$ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint $$;

CREATE TABLE settings (
    name  text PRIMARY KEY, -- 'signing_key'
    value bytea NOT NULL
);

CREATE TABLE environments (
    id          text COLLATE "C" PRIMARY KEY,
    name        text NOT NULL, -- JSON
    description text NOT NULL, -- JSON
    metadata    text NOT NULL, -- JSON
    created_at  bigint NOT NULL
);

CREATE TABLE sessions (
    id             text COLLATE "C" PRIMARY KEY,
    environment_id text COLLATE "C" NOT NULL,
    metadata       text NOT NULL, -- JSON
    created_at     bigint NOT NULL,
    script         text, -- JSON
    title          text, -- JSON
    agent          text, -- JSON
    archived_at    bigint,
    work_id        text COLLATE "C", -- of its latest item
    event_count    bigint NOT NULL DEFAULT 0, -- and the number of its latest event
    last_event_id  text COLLATE "C",
    last_event_at  text COLLATE "C", -- as the wire shows it
    status         text
) WITH (fillfactor = 80);

CREATE TABLE items (
    id                text COLLATE "C" NOT NULL,
    environment_id    text COLLATE "C" NOT NULL,
    session_id        text COLLATE "C" NOT NULL,
    created_at        bigint NOT NULL,
    type              text NOT NULL,
    state             text NOT NULL
                      CHECK (state IN ('queued', 'starting', 'active', 'stopping', 'stopped')),
    metadata          text NOT NULL, -- JSON
    acknowledged_at   bigint,
    started_at        bigint,
    heartbeat_at      bigint,
    stop_requested_at bigint,
    stopped_at        bigint,
    holder            text,
    delivered_at      bigint,
    lease_end         bigint,
    ttl_seconds       integer NOT NULL,
    beaten            boolean NOT NULL,
    version           bigint NOT NULL DEFAULT 1, -- one more with each change
    PRIMARY KEY (environment_id, id)
) WITH (
    -- Space in each page, for versions of its rows that need no new index entries. An index must
    -- contain neither heartbeat_at nor lease_end, not even in its condition: otherwise each
    -- heartbeat would write into all indexes.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02
);
CREATE INDEX items_queued ON items (environment_id, id) WHERE state = 'queued';
CREATE INDEX items_leased ON items (environment_id, id)
    WHERE state IN ('starting', 'active', 'stopping');
CREATE INDEX items_stopped ON items (stopped_at) WHERE state = 'stopped';
CREATE INDEX items_of_session ON items (session_id);

-- The number of stopped items, since a count of them would read all. In several rows, since
-- concurrent transactions would wait for each other at one row.
CREATE TABLE stopped_counts (
    environment_id text COLLATE "C" NOT NULL,
    shard          integer NOT NULL,
    count          bigint NOT NULL,
    PRIMARY KEY (environment_id, shard)
) WITH (fillfactor = 50);

CREATE TABLE events (
    session_id   text COLLATE "C" NOT NULL,
    seq          bigint NOT NULL, -- from 1, without gaps
    id           text COLLATE "C" NOT NULL,
    type         text NOT NULL,
    processed_at text COLLATE "C" NOT NULL, -- as the wire shows it
    value        text NOT NULL, -- JSON
    PRIMARY KEY (session_id, seq),
    UNIQUE (session_id, id)
);

CREATE TABLE history (
    number    bigserial PRIMARY KEY,
    time      bigint NOT NULL,
    work_id   text COLLATE "C" NOT NULL,
    kind      text NOT NULL,
    worker_id text,
    state     text NOT NULL,
    lease_end bigint,
    op        text
);

CREATE TABLE pollers (
    environment_id text COLLATE "C" NOT NULL,
    worker_id      text NOT NULL,
    seen_at        bigint NOT NULL,
    PRIMARY KEY (environment_id, worker_id)
) WITH (fillfactor = 50);
