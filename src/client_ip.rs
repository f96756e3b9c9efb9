//! Who a request comes from, when proxies stand between.
//!
//! **Invariant:** a client cannot choose its own address: of `X-Forwarded-For`
//! only what a trusted proxy has added is believed.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

/// Returns the address nearest to us that is not a trusted proxy's.
///
/// `x_forwarded_for` are the values of that header in the order of the lines;
/// each proxy appends the address it was called from, so they are read from the
/// right, as long as the last speaker is in `trusted`. What is no address ends
/// the walk at the proxy that let it pass. If everybody is trusted, it is the
/// first of the row.
///
/// IPv4 addresses written as IPv6 (`::ffff:192.0.2.1`) are returned as IPv4.
pub fn client_ip<'a>(
    peer: IpAddr,
    x_forwarded_for: impl Iterator<Item = &'a str>,
    trusted: &[IpNet],
) -> IpAddr {
    let is_trusted = |ip: IpAddr| trusted.iter().any(|net| net.contains(&ip));
    let mut client = peer.to_canonical();
    if !is_trusted(client) {
        return client;
    }
    let values: Vec<&str> = x_forwarded_for.collect();
    for hop in values.iter().rev().flat_map(|value| value.rsplit(',')) {
        let Some(ip) = parse_hop(hop.trim()) else {
            break;
        };
        client = ip;
        if !is_trusted(client) {
            break;
        }
    }
    client
}

/// Returns what counts as one client: of IPv6 a /64, of which anybody gets at
/// least one, with more addresses than there are stars.
pub fn one_client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
    }
}

/// Reads an address with or without a port, IPv6 with or without brackets.
fn parse_hop(text: &str) -> Option<IpAddr> {
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    text.parse()
        .ok()
        .or_else(bracketed)
        .or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()))
        .map(|ip: IpAddr| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(peer: &str, lines: &[&str]) -> String {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        client_ip(peer.parse().unwrap(), lines.iter().copied(), &trusted).to_string()
    }

    #[test]
    fn a_stranger_is_who_connects_whatever_it_says() {
        assert_eq!(seen("192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
    }

    #[test]
    fn a_trusted_proxy_tells_who_called_it() {
        assert_eq!(seen("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(seen("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn what_a_client_put_in_front_is_not_believed() {
        assert_eq!(
            seen("10.0.0.1", &["127.0.0.1, 198.51.100.7, 10.0.0.2"]),
            "198.51.100.7"
        );
        assert_eq!(
            seen("10.0.0.1", &["127.0.0.1", "198.51.100.7", "10.0.0.2"]),
            "198.51.100.7"
        );
    }

    #[test]
    fn a_row_of_trusted_proxies_ends_at_its_first() {
        assert_eq!(seen("10.0.0.1", &["10.0.0.3,10.0.0.2"]), "10.0.0.3");
    }

    #[test]
    fn garbage_stops_the_walk() {
        for garbage in [
            "unknown",
            "",
            "10.0.0.2, ",
            "198.51.100.7, _hidden",
            "198.51.100.7, 10.0.0.256",
            "198.51.100.7, [::1",
            "198.51.100.7, fe80::1%eth0",
            "198.51.100.7, 10.0.0.2:99999",
        ] {
            assert_eq!(seen("10.0.0.1", &[garbage]), "10.0.0.1", "{garbage:?}");
        }
        assert_eq!(seen("10.0.0.1", &["198.51.100.7, ?, 10.0.0.2"]), "10.0.0.2");
    }

    #[test]
    fn ports_and_brackets_are_taken_off() {
        for (written, ip) in [
            ("198.51.100.7:4711", "198.51.100.7"),
            ("[2001:db8::7]:4711", "2001:db8::7"),
            ("[2001:db8::7]", "2001:db8::7"),
            ("2001:db8::7", "2001:db8::7"),
            ("\t198.51.100.7 ", "198.51.100.7"),
        ] {
            assert_eq!(seen("fd00::1", &[written]), ip);
        }
    }

    #[test]
    fn ipv4_in_ipv6_is_ipv4() {
        assert_eq!(seen("::ffff:10.0.0.1", &["::ffff:192.0.2.9"]), "192.0.2.9");
        assert_eq!(seen("::ffff:192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
    }
}
