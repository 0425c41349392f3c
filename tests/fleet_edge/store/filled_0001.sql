INSERT INTO devices (device, first_seen_at, seen_at)
VALUES ('sensor-1', '2026-03-04 10:30:00', '2026-03-04 10:30:00');

INSERT INTO edges (edge, first_seen_at, seen_at)
VALUES ('edge-1', '2026-03-04 10:30:00', '2026-03-04 10:30:00');

INSERT INTO sessions (session, opened_at, last_at, last_segment, device, device_wait_ms)
VALUES ('00112233445566aa', '2026-03-04 10:30:00', '2026-03-04 10:30:02', 1772620200000000, 'sensor-1', 900);

INSERT INTO segments (session, segment, device, edge, duration_ms, tokens, rounds, queue_ms, compute_ms, batch_sum)
VALUES ('00112233445566aa', 1772620200000000, 'sensor-1', 'edge-1', 2000, 20, 5, 10, 200, 15);

INSERT INTO rounds (session, segment, round, base, drafted, tested, accepted, batch, uplink_bytes, downlink_bytes,
                    queue_ms, compute_ms, at)
VALUES ('00112233445566aa', 1772620200000000, 0, 0, 5, 4, 3, 3, 48, 32, 2, 40, '2026-03-04 10:30:01');

INSERT INTO rollups (hour, device, sessions, segments, duration_ms, tokens, rounds, drafted, tested, accepted,
                     uplink_bytes, downlink_bytes, queue_ms, compute_ms, batch_sum)
VALUES ('2026-03-04 10:00:00', 'sensor-1', 1, 1, 2000, 20, 5, 0, 0, 0, 0, 0, 10, 200, 15);
