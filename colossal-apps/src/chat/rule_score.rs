//! A score by rule for the notes of the default run. No training step ever sees it.
//!
//! A share of six: greets the one the prompt names, names its topic, names its day, thanks at the
//! end, ends with a full stop, repeats no sentence and stays short.

/// The score of an answer, in [0, 1].
///
/// ```
/// use colossal_apps::chat::rule_score::rule_score;
/// let prompt = "Invite Mara to the picnic on Friday.";
/// let good = "Dear Mara, please come to the picnic on Friday. Thank you and best wishes.";
/// assert_eq!(rule_score(prompt, good), 1.0);
/// assert!(rule_score(prompt, "Mara, please come to the walk on Friday.") < 0.7);
/// ```
pub fn rule_score(prompt: &str, answer: &str) -> f64 {
    let words: Vec<&str> = prompt.trim_end_matches('.').split_whitespace().collect();
    let day = words.last().copied().unwrap_or_default();
    let topic = words.len().checked_sub(3).map_or("", |i| words[i]);
    let name = words.iter().skip(1).find(|w| w.starts_with(char::is_uppercase)).copied();
    let answer = answer.trim();
    let sentences: Vec<&str> = answer
        .split_inclusive(['.', '?'])
        .map(|s| s.rsplit(", ").next().unwrap_or(s).trim())
        .filter(|s| !s.is_empty())
        .collect();
    let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
    let repeats =
        (0..sentences.len()).any(|i| sentences[..i].iter().any(|s| same(s, sentences[i])));
    let has = |w: &str| answer.split(|c: char| !c.is_alphanumeric()).any(|a| a == w);
    let checks = [
        name.is_some_and(|n| answer.starts_with(&format!("Dear {n},"))),
        has(topic),
        has(day),
        answer.contains("Thank you and"),
        answer.ends_with('.'),
        !repeats && answer.split_whitespace().count() <= 30 && !answer.is_empty(),
    ];
    checks.iter().filter(|c| **c).count() as f64 / checks.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_costs_its_share() {
        let prompt = "Ask Tom what to bring to the game on Sunday.";
        let good =
            "Dear Tom, what shall I bring to the game on Sunday? Thank you and see you soon.";
        assert_eq!(rule_score(prompt, good), 1.0);
        for (from, to) in [
            ("Tom", "Paul"),
            ("game", "trip"),
            ("Sunday", "Monday"),
            ("Thank you and see", "See"),
            ("soon.", "soon"),
        ] {
            let score = rule_score(prompt, &good.replace(from, to));
            assert!((score - 5.0 / 6.0).abs() < 1e-9, "{to}: {score}");
        }
        let twice = format!("{good} Thank you and see you soon.");
        assert!((rule_score(prompt, &twice) - 5.0 / 6.0).abs() < 1e-9);
        assert_eq!(rule_score(prompt, ""), 0.0);
    }
}
