-- Panels of a Logfire dashboard for poolkit's pools. Printed by `poolkit dashboard logfire`.
--
-- In Logfire: New dashboard, then one panel for each query below, of the type named above it.
-- $resolution is Logfire's own variable; in the SQL workbench write an interval in its place, as
-- time_bucket('1 minute', recorded_timestamp). With a dashboard variable `pool` (a text, such as
-- 'db:5432/app'), add: AND attributes->>'db.client.connection.pool.name' = $pool

-- Utilisation (time series, dimension pool): used connections as a share of the most there may be,
-- of the fullest process
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'db.client.connection.pool.name' AS pool,
    max(scalar_value) AS utilisation
FROM metrics
WHERE metric_name = 'poolkit.pool.utilisation'
GROUP BY x, pool
ORDER BY x;

-- Connections (time series, dimension state): of one process on average, against the most there
-- may be
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    CASE metric_name
        WHEN 'db.client.connection.count' THEN attributes->>'db.client.connection.state'
        WHEN 'poolkit.connection.opening' THEN 'opening'
        WHEN 'db.client.connection.pending_requests' THEN 'waiting'
        ELSE 'max'
    END AS state,
    avg(scalar_value) AS connections
FROM metrics
WHERE metric_name IN (
    'db.client.connection.count',
    'db.client.connection.pending_requests',
    'db.client.connection.max',
    'poolkit.connection.opening'
)
GROUP BY x, state
ORDER BY x;

-- Wait for a connection (time series, metrics p50, p95 and p99, in seconds)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_quantile(0.50, value) AS p50,
    metric_quantile(0.95, value) AS p95,
    metric_quantile(0.99, value) AS p99
FROM metrics
WHERE metric_name = 'db.client.connection.wait_time'
GROUP BY x
ORDER BY x;

-- Use of a connection (time series, metrics p50, p95 and p99, in seconds)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_quantile(0.50, value) AS p50,
    metric_quantile(0.95, value) AS p95,
    metric_quantile(0.99, value) AS p99
FROM metrics
WHERE metric_name = 'db.client.connection.use_time'
GROUP BY x
ORDER BY x;

-- Longest use (time series, dimension pool, in seconds)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'db.client.connection.pool.name' AS pool,
    max(scalar_value) AS longest_use
FROM metrics
WHERE metric_name = 'poolkit.connection.longest_use'
GROUP BY x, pool
ORDER BY x;

-- Timeouts, refusals, overload (time series, dimension what)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_name AS what,
    metric_increase(value, recorded_timestamp) AS happened
FROM metrics
WHERE metric_name IN (
    'db.client.connection.timeouts',
    'poolkit.checkout.refusals',
    'poolkit.pool.overloads',
    'poolkit.connection.long_holders',
    'poolkit.transaction.retries'
)
GROUP BY x, what
ORDER BY x;

-- Connect time (time series, metrics p50 and p95, in seconds)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_quantile(0.50, value) AS p50,
    metric_quantile(0.95, value) AS p95
FROM metrics
WHERE metric_name = 'db.client.connection.create_time'
GROUP BY x
ORDER BY x;

-- Connect failures (time series, dimension kind)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'poolkit.fault.kind' AS kind,
    metric_increase(value, recorded_timestamp) AS failures
FROM metrics
WHERE metric_name = 'poolkit.connection.open_failures'
GROUP BY x, kind
ORDER BY x;

-- Closed connections (time series, dimension reason)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'poolkit.close.reason' AS reason,
    metric_increase(value, recorded_timestamp) AS closed
FROM metrics
WHERE metric_name = 'poolkit.connection.closed'
GROUP BY x, reason
ORDER BY x;

-- Pings (time series, dimension what)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_name AS what,
    metric_increase(value, recorded_timestamp) AS pings
FROM metrics
WHERE metric_name IN ('poolkit.connection.pings', 'poolkit.connection.ping_failures')
GROUP BY x, what
ORDER BY x;

-- Statement time, p95 (time series, dimension operation, in seconds)
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'db.operation.name' AS operation,
    metric_quantile(0.95, value) AS p95
FROM metrics
WHERE metric_name = 'db.client.operation.duration'
GROUP BY x, operation
ORDER BY x;

-- Statements that failed (time series, dimension error): by SQLSTATE, or by what went wrong where
-- the server said none; 57014 and statement_timeout are the statement timeout
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    attributes->>'error.type' AS error,
    sum(metric_count(value)) AS failed
FROM metrics
WHERE metric_name = 'db.client.operation.duration'
    AND attributes->>'error.type' IS NOT NULL
    AND aggregation_temporality = 'delta'
GROUP BY x, error
ORDER BY x;

-- Connections of the server (time series, dimension what): needs
-- DATABASE_TELEMETRY_SERVER_INTERVAL
SELECT
    time_bucket($resolution, recorded_timestamp) AS x,
    metric_name AS what,
    max(scalar_value) AS connections
FROM metrics
WHERE metric_name IN ('poolkit.server.connections', 'poolkit.server.connections.max')
GROUP BY x, what
ORDER BY x;

-- Pool events (table): timeouts, refusals, failed connects, lost connections, long holders, with
-- the pool's state; trace_id leads to what the caller was doing
SELECT
    start_timestamp,
    level_name(level) AS level,
    attributes->>'poolkit.event' AS event,
    attributes->>'db.client.connection.pool.name' AS pool,
    message,
    trace_id
FROM records
WHERE otel_scope_name = 'logfire.poolkit'
    AND level >= 'warn'
ORDER BY start_timestamp DESC
LIMIT 100;

-- Pool events (time series, dimension event)
SELECT
    time_bucket($resolution, start_timestamp) AS x,
    attributes->>'poolkit.event' AS event,
    count() AS happened
FROM records
WHERE otel_scope_name = 'logfire.poolkit'
    AND level >= 'warn'
GROUP BY x, event
ORDER BY x;

-- Slow statements (table): what takes the most time altogether
SELECT
    attributes->>'db.query.summary' AS statement,
    count() AS times,
    approx_percentile_cont(0.95) WITHIN GROUP (ORDER BY duration) AS p95,
    max(duration) AS longest,
    sum(duration) AS altogether
FROM records
WHERE otel_scope_name = 'poolkit'
    AND attributes->>'db.query.summary' IS NOT NULL
GROUP BY statement
ORDER BY altogether DESC
LIMIT 20;

-- Slow checkouts (table): callers that waited for a connection
SELECT
    start_timestamp,
    duration,
    attributes->>'db.client.connection.pool.name' AS pool,
    trace_id
FROM records
WHERE span_name = 'pool.checkout'
ORDER BY duration DESC
LIMIT 50;
