//! PURE. The ids of attempts: the epoch of the ensemble that placed them, and the revision at which it did. None is used twice.

/// The id of what is placed at a revision.
pub fn id(epoch: i64, revision: i64) -> String {
    format!("{epoch}-{revision}")
}

/// The epoch in which an attempt was placed; none where the text is no id of one.
pub fn epoch(id: &str) -> Option<i64> {
    let (epoch, revision) = id.split_once('-')?;
    revision.parse::<u64>().ok()?;
    epoch.parse().ok().filter(|epoch| *epoch > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_says_its_epoch_and_what_is_none_says_nothing() {
        assert_eq!(epoch(&id(3, 70)), Some(3));
        for other in ["", "3", "3-", "-3-4", "0-4", "x-4", "3-x", "3--4"] {
            assert_eq!(epoch(other), None, "{other}");
        }
    }
}
