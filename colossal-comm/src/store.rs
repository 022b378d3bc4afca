//! A few keys and values on rank 0, reached over TCP: it hands out NCCL's id, and tells who is in
//! which call when something goes wrong. No payload travels through it.
//!
//! Rank 0 serves. A connection that ends without a goodbye is a process that died: the server
//! notes it under `lost/<rank>`. Frames are `op, key length, key, value length, value`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, Result};

const SET: u8 = 1;
const LIST: u8 = 2;
const BYE: u8 = 3;
const MAGIC: u64 = u64::from_le_bytes(*b"colossal");
/// Longest key or value that is read: whoever sends more is none of ours.
const LIMIT: u32 = 1 << 20;

type Pairs = BTreeMap<String, Vec<u8>>;

/// This rank's connection.
#[derive(Debug)]
pub(crate) struct Store {
    address: String,
    connection: Mutex<TcpStream>,
}

impl Store {
    /// Connects to rank 0, which serves, and waits until all ranks have.
    ///
    /// # Errors
    /// [`Error::Engine`] that names the ranks that did not come in time, or the rank that was
    /// started with another number of ranks.
    pub(crate) fn join(
        address: &str,
        rank: usize,
        ranks: usize,
        timeout: Duration,
    ) -> Result<Store> {
        let deadline = Instant::now() + timeout;
        let wrong = |what: String| Error::Engine { op: "store".into(), reason: what };
        if rank == 0 {
            let listener = TcpListener::bind(address)
                .map_err(|e| wrong(format!("rank 0 cannot listen on {address}: {e}")))?;
            let pairs = Arc::new(Mutex::new(Pairs::new()));
            let serve = move || {
                // Ends with the process: ranks may need it until they end.
                for connection in listener.incoming().flatten() {
                    let pairs = pairs.clone();
                    std::thread::spawn(move || answer(connection, &pairs, ranks));
                }
            };
            std::thread::Builder::new()
                .name("store".into())
                .spawn(serve)
                .map_err(|e| wrong(format!("no thread for the store: {e}")))?;
        }
        let connection = loop {
            match connect(address, timeout) {
                Ok(connection) => break connection,
                Err(e) if Instant::now() >= deadline => {
                    let what = format!(
                        "rank {rank} cannot reach rank 0 at {address} within {timeout:?}: {e}"
                    );
                    return Err(wrong(what));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let store = Store { address: address.into(), connection: Mutex::new(connection) };
        let hello = [MAGIC, rank as u64, ranks as u64].map(u64::to_le_bytes).concat();
        store.talk(|c| c.write_all(&hello))?;
        let refusal = store.talk(read_bytes)?;
        if !refusal.is_empty() {
            return Err(wrong(String::from_utf8_lossy(&refusal).into_owned()));
        }
        loop {
            let here = store.list("joined/")?;
            if here.len() == ranks {
                return Ok(store);
            }
            if Instant::now() >= deadline {
                let missing: Vec<usize> =
                    (0..ranks).filter(|r| !here.contains_key(&format!("joined/{r}"))).collect();
                let what = format!(
                    "rank(s) {missing:?} of {ranks} did not join at {address} within {timeout:?}"
                );
                return Err(wrong(what));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes a value.
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.talk(|c| {
            c.write_all(&frame(SET, key, value))?;
            read_bytes(c).map(drop)
        })
    }

    /// All pairs whose key begins with `prefix`.
    pub(crate) fn list(&self, prefix: &str) -> Result<Pairs> {
        self.talk(|c| {
            c.write_all(&frame(LIST, prefix, &[]))?;
            let count = read_u32(c)?;
            let pair = |_| Ok((read_text(c)?, read_bytes(c)?));
            (0..count).map(pair).collect()
        })
    }

    /// The value of a key, once somebody has written it.
    pub(crate) fn wait(&self, key: &str, deadline: Instant) -> Result<Vec<u8>> {
        loop {
            if let Some(value) = self.list(key)?.remove(key) {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                let reason = format!("nobody wrote {key} in time");
                return Err(Error::Engine { op: "store".into(), reason });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn talk<R>(&self, words: impl FnOnce(&mut TcpStream) -> io::Result<R>) -> Result<R> {
        words(&mut self.connection.lock()).map_err(|e| {
            let reason = format!("rank 0 at {} no longer answers: {e}", self.address);
            Error::Engine { op: "store".into(), reason }
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A panic is no goodbye. Who does not hear it is gone itself.
        if !std::thread::panicking() {
            let _ = self.talk(|c| c.write_all(&frame(BYE, "", &[])));
        }
    }
}

fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let nothing = || io::Error::other("the name has no address");
    let to = address.to_socket_addrs()?.next().ok_or_else(nothing)?;
    let connection = TcpStream::connect_timeout(&to, timeout)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(timeout))?;
    connection.set_write_timeout(Some(timeout))?;
    Ok(connection)
}

/// Serves one rank until it ends.
fn answer(mut connection: TcpStream, pairs: &Mutex<Pairs>, ranks: usize) {
    let mut hello = [0u8; 24];
    let Ok(()) = connection.read_exact(&mut hello) else { return };
    let word = |i: usize| {
        hello[8 * i..8 * i + 8].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
    };
    if word(0) != MAGIC {
        return;
    }
    let (rank, theirs) = (word(1), word(2));
    let joined = format!("joined/{rank}");
    let refusal = if theirs != ranks as u64 || rank >= theirs {
        format!("rank {rank} was started as one of {theirs} and rank 0 as one of {ranks}")
    } else if pairs.lock().insert(joined, vec![]).is_some() {
        format!("rank {rank} was started twice")
    } else {
        String::new()
    };
    let mut left = !refusal.is_empty();
    let mut talk = || -> io::Result<()> {
        connection.write_all(&length(refusal.len()))?;
        connection.write_all(refusal.as_bytes())?;
        while !left {
            let mut op = [0u8];
            connection.read_exact(&mut op)?;
            let (key, value) = (read_text(&mut connection)?, read_bytes(&mut connection)?);
            match op[0] {
                SET => {
                    pairs.lock().insert(key, value);
                    connection.write_all(&length(0))?;
                }
                LIST => {
                    let all = pairs.lock();
                    let found: Vec<_> =
                        all.range(key.clone()..).take_while(|(k, _)| k.starts_with(&key)).collect();
                    let mut text = length(found.len()).to_vec();
                    for (key, value) in found {
                        for bytes in [key.as_bytes(), value] {
                            text.extend_from_slice(&length(bytes.len()));
                            text.extend_from_slice(bytes);
                        }
                    }
                    drop(all);
                    connection.write_all(&text)?;
                }
                BYE => left = true,
                _ => return Err(io::Error::other("no such op")),
            }
        }
        Ok(())
    };
    // However it ended: either the rank said goodbye, or it is lost.
    let _ = talk();
    if !left {
        pairs.lock().insert(format!("lost/{rank}"), vec![]);
    }
}

fn length(len: usize) -> [u8; 4] {
    // Keys are names of groups and values headers or errors; longer ones are refused when read.
    u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes()
}

fn frame(op: u8, key: &str, value: &[u8]) -> Vec<u8> {
    let (k, v) = (length(key.len()), length(value.len()));
    [&[op], &k[..], key.as_bytes(), &v, value].concat()
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut len = [0u8; 4];
    from.read_exact(&mut len)?;
    Ok(u32::from_le_bytes(len))
}

fn read_bytes(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let len = read_u32(from)?;
    if len > LIMIT {
        return Err(io::Error::other(format!("{len} bytes announced")));
    }
    let mut bytes = vec![0u8; len as usize];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_text(from: &mut impl Read) -> io::Result<String> {
    String::from_utf8(read_bytes(from)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// An address that nobody listens on.
    fn address() -> String {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    }

    #[test]
    fn what_one_rank_writes_the_others_read() {
        let at = &address();
        std::thread::scope(|s| {
            for rank in 0..3 {
                s.spawn(move || {
                    let store = Store::join(at, rank, 3, SOON).unwrap();
                    store.set(&format!("id/{rank}"), &[rank as u8; 128]).unwrap();
                    for other in 0..3 {
                        let key = format!("id/{other}");
                        let got = store.wait(&key, Instant::now() + SOON).unwrap();
                        assert_eq!(got, [other as u8; 128]);
                    }
                });
            }
        });
    }

    #[test]
    fn who_does_not_come_and_who_came_to_another_job_is_named() {
        let at = &address();
        let short = Duration::from_millis(300);
        let text = Store::join(at, 0, 3, short).unwrap_err().to_string();
        assert!(text.contains("[1, 2] of 3 did not join"), "{text}");
        let text = Store::join(at, 1, 4, SOON).unwrap_err().to_string();
        assert!(text.contains("one of 4 and rank 0 as one of 3"), "{text}");
    }

    #[test]
    fn a_process_that_dies_is_lost_and_one_that_leaves_is_not() {
        let at = &address();
        let [zero, one, two] = std::thread::scope(|s| {
            let join = |rank| s.spawn(move || Store::join(at, rank, 3, SOON).unwrap());
            [join(0), join(1), join(2)].map(|t| t.join().unwrap())
        });
        drop(one);
        // As the system does when a process is killed.
        two.connection.lock().shutdown(std::net::Shutdown::Both).unwrap();
        zero.wait("lost/2", Instant::now() + SOON).unwrap();
        assert_eq!(zero.list("lost/").unwrap().len(), 1);
    }

    #[test]
    fn noise_ends_its_own_connection_only() {
        let at = &address();
        let store = Store::join(at, 0, 1, SOON).unwrap();
        for noise in [&b"GET / HTTP/1.1\r\n\r\n        "[..], b"short"] {
            TcpStream::connect(at).unwrap().write_all(noise).unwrap();
        }
        let mut long = frame(SET, "key", &[]);
        long[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(store.talk(|c| c.write_all(&long).and_then(|()| read_bytes(c))).is_err());
        assert!(store.set("a", b"b").is_err(), "the connection has ended, with an error");
    }
}
